"""Every family, streamed layer by layer, against the same checkpoint loaded by transformers.

    pytest tests/runtime/test_families.py

Equal in every bit: the same kernels run on the same numbers.
"""

from __future__ import annotations

import pytest
import torch
from dense_models import STATED, dense_checkpoint, read_config, write_config
from streamed import loaded_logits, make_batches, same, streamed_logits
from tiny_models import TINY, tiny_checkpoint

from moe_compose.architectures import all_architectures
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.runtime import Runner, runner

FAMILIES = [n for n, form in all_architectures().items() if form.is_moe and n in TINY]

#: Families whose experts do not have transformers' interface.
WITHOUT_INTERFACE = {"jetmoe", "llama4_text"}

#: Families some of whose layers route by token id.
HASH_ROUTED = {"deepseek_v4": {0}}

BATCHES = make_batches()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def test_every_family_is_run():
    """All but Kimi K2, which transformers does not know under its own name."""
    everything = {name for name, form in all_architectures().items() if form.is_moe}
    assert everything - set(FAMILIES) == {"kimi_k2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_loaded(family, tmp_path):
    tiny_checkpoint(family, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    stream = Runner(checkpoint)
    assert same(streamed_logits(stream, BATCHES), loaded_logits(tmp_path, BATCHES))
    assert not stream.unused
    sparse = {
        i for i, s in enumerate(all_architectures()[family].moe(checkpoint.config).sparse) if s
    }
    routed = sparse - HASH_ROUTED.get(family, set())
    assert {layer.index for layer in stream.layers if layer.router is not None} == routed
    if family not in WITHOUT_INTERFACE:
        assert {layer.index for layer in stream.layers if layer.experts is not None} == sparse


def test_a_family_by_another_name(tmp_path):
    """Kimi K2's config names code of its own; its class is DeepSeek-V3's."""
    tiny_checkpoint("deepseek_v3", tmp_path)
    expected = loaded_logits(tmp_path, BATCHES)
    write_config(tmp_path, {**read_config(tmp_path), "model_type": "kimi_k2", "auto_map": {}})
    assert same(streamed_logits(Checkpoint.open(tmp_path), BATCHES), expected)


@pytest.mark.parametrize("family", sorted(STATED))
def test_dense_sources_too(family, tmp_path):
    dense_checkpoint(family, tmp_path)
    found = streamed_logits(Checkpoint.open(tmp_path), BATCHES)
    assert same(found, loaded_logits(tmp_path, BATCHES))


@pytest.mark.parametrize(
    "family",
    [
        *("deepseek_v3", "minimax_m2", "gpt_oss", "ernie4_5_moe", "longcat_flash", "lfm2_moe"),
        *("qwen3_next", "gemma4_text", "nemotron_h", "deepseek_v4", "zaya", "hunyuan_v1_moe"),
    ],
)
def test_bfloat16(family, tmp_path):
    """Correction biases and other parameters that the class keeps in fp32 included."""
    tiny_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    found = streamed_logits(Checkpoint.open(tmp_path), BATCHES, dtype="bfloat16")
    assert same(found, loaded_logits(tmp_path, BATCHES, torch.bfloat16))


def test_what_the_class_keeps_wide_stays_wide(tmp_path):
    tiny_checkpoint("deepseek_v3", tmp_path)
    names = {"bfloat16": torch.float32, "float32": torch.float32, "float64": torch.float64}
    for dtype, bias in names.items():
        seen = {}

        def note(layer, seen=seen):
            seen.update({n: t.dtype for n, t in layer.module.state_dict().items()})

        Runner(Checkpoint.open(tmp_path), dtype=dtype).run([torch.tensor([[5, 6]])], on_layer=note)
        assert seen.pop("mlp.gate.e_score_correction_bias") == bias
        assert set(seen.values()) == {DTYPES[dtype]}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_float64(family, tmp_path):
    tiny_checkpoint(family, tmp_path)
    found = streamed_logits(Checkpoint.open(tmp_path), BATCHES, dtype="float64")
    assert same(found, loaded_logits(tmp_path, BATCHES, torch.float64))


def test_float64_is_wide_where_the_class_pins_float32(tmp_path):
    """HunYuan's router is fp32 in a loaded fp64 model, and fp64 here: fp32's noise apart."""
    tiny_checkpoint("hunyuan_v1_moe", tmp_path)
    found = streamed_logits(Checkpoint.open(tmp_path), BATCHES, dtype="float64")
    for a, b in zip(found, loaded_logits(tmp_path, BATCHES, torch.float64), strict=True):
        assert 0 < (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama4_text", "gemma4_text", "granitemoe", "longcat_flash"])
def test_large_tensors_outside_come_and_go(family, tmp_path, monkeypatch):
    """Embedding and head are filled when they are used, tied or not."""
    monkeypatch.setattr(runner, "SMALL", 0)
    for tied in (True, False):
        folder = tmp_path / str(tied)
        tiny_checkpoint(family, folder, tie_word_embeddings=tied)
        found = streamed_logits(Checkpoint.open(folder), BATCHES)
        assert same(found, loaded_logits(folder, BATCHES))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jamba", "deepseek_v3"])
def test_another_layers_weights_are_noticed(family, tmp_path, monkeypatch):
    """The control: two layers of one kind exchange what fills them."""
    changes = {"first_k_dense_replace": 1} if family == "deepseek_v3" else {}
    tiny_checkpoint(family, tmp_path, num_hidden_layers=4, **changes)
    expected = loaded_logits(tmp_path, BATCHES)
    stream = Runner(Checkpoint.open(tmp_path))
    names = stream._skeleton.of_layer
    load = stream._loader.load
    swap = dict(zip(names[1], names[3], strict=False))
    swap |= {b: a for a, b in swap.items()}
    assert len(names[1]) == len(names[3])

    def wrong(wanted, stop=None):
        found = load([swap.get(n, n) for n in wanted], stop)
        return {n: found[swap.get(n, n)] for n in wanted}

    monkeypatch.setattr(stream._loader, "load", wrong)
    assert not same(streamed_logits(stream, BATCHES), expected)
