"""Running layer by layer: order, observers, memory, plans, errors, threads.

pytest tests/runtime/test_runner.py
"""

from __future__ import annotations

import gc
import json
import threading
import time
from _thread import interrupt_main
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from dense_models import read_config, write_config
from hand_made import plan_of
from safetensors.torch import load_file, save_file
from streamed import loaded_logits, make_batches, same, streamed_logits
from tiny_models import tiny_checkpoint

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write
from moe_compose.errors import CheckpointError, OptionError, UnsupportedError
from moe_compose.runtime import Batch, Runner, compat, parking, runner, self_test

BATCHES = make_batches()
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Qwen3-MoE of four layers, two of them sparse."""
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint("qwen3_moe", folder, num_hidden_layers=4)
    return folder


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def expected(folder):
    return loaded_logits(folder, BATCHES)


# Determinism


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("activations", [1 << 30, 0])
def test_reading_ahead_and_filing_away_change_nothing(
    folder, expected, monkeypatch, prefetch, activations
):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    filed = []
    send = parking.Parking._send_away

    def note(*args):
        filed.append(args)
        send(*args)

    monkeypatch.setattr(parking.Parking, "_send_away", note)
    found = streamed_logits(
        Checkpoint.open(folder), BATCHES, prefetch=prefetch, activations=activations
    )
    assert same(found, expected)
    assert bool(filed) == (activations == 0)


def test_order_and_company_of_batches_change_nothing(folder, expected):
    run = Runner(Checkpoint.open(folder))
    assert same(streamed_logits(run, BATCHES[::-1])[::-1], expected)
    assert same(streamed_logits(run, BATCHES[1:]), expected[1:])
    assert same(streamed_logits(run, BATCHES * 3), expected * 3)


@pytest.mark.parametrize("family", ["gemma4_text", "jamba", "deepseek_v4", "zaya"])
def test_whatever_a_forward_holds_may_be_filed_away(family, tmp_path, monkeypatch):
    """Masks, rotary embeddings, embeddings that every layer takes part of."""
    monkeypatch.setattr(parking, "SMALLEST", 0)
    tiny_checkpoint(family, tmp_path)
    found = streamed_logits(Checkpoint.open(tmp_path), BATCHES, activations=0)
    assert same(found, loaded_logits(tmp_path, BATCHES))


def test_parked_tensors_leave_memory_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(parking, "SMALLEST", 64)
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    copy, small = tensor.clone(), torch.ones(2)
    lot = parking.Parking(0, tmp_path)
    lot.put(0, ((tensor,), {"x": [small]}))
    assert tensor.numel() == 0 and small.numel() == 2
    lot.take(0)
    assert torch.equal(tensor, copy)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    lot.put(0, tensor)
    with pytest.raises(CheckpointError, match="cut short"):
        lot.take(0)
    del tensor
    lot.put(0, ())
    assert not list(tmp_path.iterdir())


def test_what_was_changed_meanwhile_is_filed_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    tensor, lot = torch.zeros(8), parking.Parking(0, tmp_path)
    for value in (1.0, 2.0, 3.0):
        lot.put(0, tensor)
        lot.take(0)
        tensor.fill_(value)
    lot.put(0, tensor)
    lot.take(0)
    assert torch.equal(tensor, torch.full((8,), 3.0))


def test_within_the_budget_nothing_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    first, second = torch.zeros(8), torch.zeros(8)
    lot = parking.Parking(32, tmp_path)
    lot.put(0, first)
    lot.put(1, second)
    assert first.numel() == 8 and second.numel() == 0
    lot.drop(0)
    lot.take(1)
    lot.put(1, second)
    assert second.numel() == 8


# Observers


def test_observers_see_each_layer_while_it_is_real(folder):
    """Only this layer has weights; experts are called with what transformers calls them with."""
    run = Runner(Checkpoint.open(folder))
    seen = []

    @contextmanager
    def observe(layer):
        real = [
            i for i, other in enumerate(run.layers) if not next(other.module.parameters()).is_meta
        ]
        assert real == [layer.index]
        calls = []

        def note(module, args):
            hidden, index, weights = args
            calls.append((layer.index_of_batch, layer.batch.ids.numel(), len(hidden)))
            assert index.shape == weights.shape == (len(hidden), 2)

        handles = [layer.module.register_forward_hook(lambda *_: calls.append("layer"))]
        if layer.experts is not None:
            handles.append(layer.experts.register_forward_pre_hook(note))
        yield
        for handle in handles:
            handle.remove()
        seen.append((layer.index, calls))

    run.run(BATCHES, on_layer=observe)
    sparse = [(0, 56, 56), "layer", (1, 17, 17), "layer"]
    dense = ["layer", "layer"]
    assert seen == [(0, dense), (1, sparse), (2, dense), (3, sparse)]
    assert all(p.is_meta for p in run.model.parameters())


def test_routers_are_found(folder):
    run = Runner(Checkpoint.open(folder))
    assert [layer.router is not None for layer in run.layers] == [False, True, False, True]
    assert run.layers[1].router.weight.shape == (6, 32)


def test_without_logits_neither_norm_nor_head_is_read(folder, monkeypatch):
    monkeypatch.setattr(runner, "SMALL", 0)
    run, read = Runner(Checkpoint.open(folder)), []
    load = run._loader.load
    monkeypatch.setattr(
        run._loader, "load", lambda names, *a: read.extend(names) or load(names, *a)
    )
    run.run([IDS])
    assert "model.embed_tokens.weight" in read and "model.layers.3.mlp.gate.weight" in read
    assert "lm_head.weight" not in read


def test_layers_are_read_once_and_in_order(folder, monkeypatch):
    checkpoint = Checkpoint.open(folder)
    read = []
    original = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name: read.append(name) or original(self, name)
    )
    run = Runner(checkpoint)
    read.clear()
    run.run(BATCHES, logits=lambda *_: None)
    layers = [name.split(".")[2] for name in read if ".layers." in name]
    assert sorted(read) == sorted(checkpoint.tensors) and layers == sorted(layers)


# Sources


@pytest.mark.parametrize("method", ["copy", "drop"])
def test_a_plan_that_was_never_written(tmp_path, method):
    tiny_checkpoint("qwen3", tmp_path / "dense")
    plan = plan_of(Checkpoint.open(tmp_path / "dense"), method=method)
    streamed = streamed_logits(plan, BATCHES)
    write(plan, tmp_path / "moe")
    assert same(streamed, loaded_logits(tmp_path / "moe", BATCHES))
    assert same(streamed, streamed_logits(Checkpoint.open(tmp_path / "moe"), BATCHES))


def test_configs_of_transformers_4_and_recorded_outputs(folder, expected, tmp_path):
    """What a config asks to record is not recorded: it would patch modules under other batches."""
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    config = read_config(folder) | {"output_router_logits": True, "use_cache": True}
    write_config(tmp_path, config)
    assert same(streamed_logits(Checkpoint.open(tmp_path), BATCHES), expected)


def changed(folder: Path, to: Path, **tensors: torch.Tensor | None) -> Checkpoint:
    """A copy with tensors replaced, added, or (None) taken out; `__` stands for a dot."""
    kept = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        kept.pop(name.replace("__", "."), None)
        if tensor is not None:
            kept[name.replace("__", ".")] = tensor
    save_file(kept, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return Checkpoint.open(to)


def test_tensors_of_other_purposes_are_ignored(folder, expected, tmp_path):
    """Multi-token-prediction layers, which transformers does not run."""
    source = changed(folder, tmp_path, mtp__fc__weight=torch.ones(3), model__layers__9__x=IDS)
    run = Runner(source)
    assert set(run.unused) == {"mtp.fc.weight", "model.layers.9.x"}
    assert same(streamed_logits(run, BATCHES), expected)


def test_a_head_that_is_stored_in_place_of_the_embedding(tmp_path):
    tiny_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    (tmp_path / "head").mkdir()
    table = load_file(tmp_path / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    source = changed(
        tmp_path / "tied",
        tmp_path / "head",
        model__embed_tokens__weight=None,
        lm_head__weight=table,
    )
    expected = loaded_logits(tmp_path / "tied", BATCHES)
    assert same(streamed_logits(source, BATCHES), expected)


@pytest.mark.parametrize("experts", ["grouped_mm", "moe_compose_triton"])
def test_other_implementations_of_experts(folder, expected, experts):
    for found, want in zip(
        streamed_logits(Checkpoint.open(folder), BATCHES, experts=experts), expected, strict=True
    ):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


# Errors


def test_what_is_missing_or_misshapen_is_told_at_once(folder, tmp_path):
    source = changed(
        folder,
        tmp_path,
        model__norm__weight=None,
        model__layers__1__mlp__gate__weight=torch.ones(5, 32),
        model__layers__3__mlp__experts__4__up_proj__weight=torch.ones(25, 32),
    )
    with pytest.raises(CheckpointError, match="is not what Qwen3MoeForCausalLM needs") as caught:
        Runner(source)
    text = str(caught.value)
    assert "model.norm.weight is missing" in text
    assert "model.layers.1.mlp.gate.weight" in text and "[5, 32], not [6, 32]" in text
    assert "model.layers.3.mlp.experts" in text


def test_one_expert_too_few_is_told(folder, tmp_path):
    gone = {
        f"model__layers__1__mlp__experts__5__{part}_proj__weight": None
        for part in ("gate", "up", "down")
    }
    with pytest.raises(CheckpointError, match=r"\[5, 48, 32\], not \[6, 48, 32\]"):
        Runner(changed(folder, tmp_path, **gone))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"model_type": "no_such_family"},
            UnsupportedError,
            r"transformers \d.* has no model_type",
        ),
        ({"model_type": "clip"}, UnsupportedError, "no causal language model for 'clip'"),
        ({"num_attention_heads": "many"}, CheckpointError, "transformers refuses the config"),
    ],
)
def test_configs_that_cannot_be_run(folder, tmp_path, changes, error, match):
    source = changed(folder, tmp_path)
    write_config(tmp_path, read_config(tmp_path) | changes)
    with pytest.raises(error, match=match):
        Runner(Checkpoint.open(tmp_path))
    del source


def test_wrong_arguments(folder):
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(OptionError, match="float33"):
        Runner(checkpoint, dtype="float33")
    run = Runner(checkpoint)
    with pytest.raises(OptionError, match="0 batches"):
        run.run([])
    with pytest.raises(OptionError, match="int64"):
        run.run([IDS.float()])
    with pytest.raises(OptionError, match="one shape"):
        run.run([Batch(IDS, torch.ones(1, 2))])


class OnPurposeError(Exception):
    """Nothing is wrong."""


@pytest.mark.parametrize("kind", [OnPurposeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["embedding", "layer", "observer", "head", "consumer", "reading"])
def test_an_error_anywhere_unwinds_everything(folder, expected, kind, where, monkeypatch):
    """It reaches the caller, no thread is left (the fixture), and the runner works afterwards."""
    run = Runner(Checkpoint.open(folder))

    def fail(*_, **__):
        raise kind("on purpose")

    def observe(layer):
        if layer.index == 2 and where == "observer":
            fail()

    modules = {
        "embedding": run.model.model.embed_tokens,
        "layer": run.layers[2].module.mlp,
        "head": run.model.lm_head,
    }
    handle = modules[where].register_forward_pre_hook(fail) if where in modules else None
    if where == "reading":
        monkeypatch.setattr(Checkpoint, "read", fail)
    consume = fail if where == "consumer" else lambda *_: None
    with pytest.raises(kind, match="on purpose"):
        run.run(BATCHES, on_layer=observe, logits=consume)
    monkeypatch.undo()
    if handle is not None:
        handle.remove()
    gc.collect()
    assert all(p.is_meta for p in run.model.parameters())
    assert same(streamed_logits(run, BATCHES), expected)


def test_ctrl_c_while_a_lane_runs(folder, expected):
    """The signal reaches the caller, who waits; the lane runs on to its next layer and ends."""
    run = Runner(Checkpoint.open(folder))

    def slow(module, args):
        threading.Timer(0.05, interrupt_main).start()
        time.sleep(0.3)

    handle = run.model.model.embed_tokens.register_forward_pre_hook(slow)
    with pytest.raises(KeyboardInterrupt):
        run.run(BATCHES)
    handle.remove()
    assert same(streamed_logits(run, BATCHES), expected)


def test_a_forward_that_swallows_exceptions_is_stopped_too(folder):
    """Lanes are unwound by what no `except Exception` catches."""
    run = Runner(Checkpoint.open(folder))
    forward = run.model.model.forward
    swallowed = []

    def stubborn(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except Exception as e:
            swallowed.append(e)
            raise

    run.model.model.forward = stubborn
    run.run(BATCHES)
    assert not swallowed


def test_one_run_at_a_time(folder):
    run = Runner(Checkpoint.open(folder))
    with pytest.raises(OptionError, match="running already"):
        run.run([IDS], on_layer=lambda layer: run.run([IDS]))


# transformers


def test_self_test_notices_other_rules(monkeypatch):
    run = compat.Job.run

    def transposed(self, model, read):
        made = run(self, model, read)
        return {n: t.mT.contiguous() if t.ndim == 3 else t for n, t in made.items()}

    self_test.self_test.__wrapped__()
    monkeypatch.setattr(compat.Job, "run", transposed)
    with pytest.raises(UnsupportedError, match=r"transformers \d+\.\d+"):
        self_test.self_test.__wrapped__()


def test_a_function_that_is_gone_is_named(monkeypatch):
    import transformers.core_model_loading as loading

    monkeypatch.delattr(loading, "rename_source_key")
    compat._api.cache_clear()
    with pytest.raises(UnsupportedError, match=r"rename_source_key is not there"):
        compat._api()
    monkeypatch.undo()
    compat._api.cache_clear()
    compat._api()


def test_footprint_is_known_before_anything_is_read(folder):
    checkpoint = Checkpoint.open(folder, headers_only=True)
    run = Runner(checkpoint)
    sizes = {n: t.nbytes for n, t in checkpoint.tensors.items()}
    layers = [sum(s for n, s in sizes.items() if f".layers.{i}." in n) for i in range(4)]
    assert run.footprint.layer == max(layers)
    assert run.footprint.outside == sum(sizes.values()) - sum(layers)
    alone = Runner(checkpoint, prefetch=False).footprint
    assert run.footprint.peak - alone.peak == max(layers)
    assert json.loads((folder / "config.json").read_text()) == dict(checkpoint.config)
