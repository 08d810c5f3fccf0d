"""Adapters that PEFT wrote, on the weights of a tiny model: what PEFT's own merge gives.

Run: pytest tests/surgery/test_lora.py
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_models import dense_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from moe_compose.architectures import all_architectures
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.errors import CheckpointError, PlanError, UnsupportedError
from moe_compose.surgery import evaluate
from moe_compose.surgery.lora import Adapter, LowRank, is_adapter
from moe_compose.surgery.transforms import Read

peft = pytest.importorskip("peft", reason="the reference: pip install peft")

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": FFN, "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": FFN, "r": 3, "lora_alpha": 7, "use_rslora": True},
    "patterns": {
        "target_modules": [*FFN, *ATTENTION],
        "r": 3,
        "lora_alpha": 7,
        "rank_pattern": {"down_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 11, "gate_proj": 1},
    },
    "the head too": {
        "target_modules": ["up_proj", "lm_head"],
        "rank_pattern": {"lm_head": 4},
    },
}


def tiny_gpt2() -> PreTrainedModel:
    """A model whose weights are stored `[in, out]`."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def saved(model: PreTrainedModel, config: Any, folder: Path) -> Any:
    """A PEFT model with an adapter drawn at random, which is saved in `folder`."""
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT still asks for what transformers deprecates
        found = peft.get_peft_model(model, config)
        for name, p in found.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
        found.save_pretrained(folder, save_embedding_layers=False)
    return found


def trained(model: PreTrainedModel, folder: Path, **config: Any) -> Any:
    """The same of a LoRA."""
    return saved(model, peft.LoraConfig(task_type="CAUSAL_LM", **config), folder)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def applied(adapter: Adapter, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight with the adapter on it."""
    made = {}
    for name, tensor in before.items():
        read = Read("w", TensorInfo.of(name, "F32", tuple(tensor.shape)))
        node = adapter.applied(name, read, "a")
        if node is read:
            made[name] = tensor
            continue
        evaluate.check_on_meta(node)
        assert adapter.label not in str(node) and "a:" in str(node)
        a, b = adapter.modules[name.removesuffix(".weight")]
        made[name] = node.apply(tensor, adapter.read(b.name), adapter.read(a.name))
    return made


def worst(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert expected.keys() == found.keys()
    return max(float((found[n] - t).norm() / t.norm()) for n, t in expected.items() if t.norm())


def changed(folder: Path, **entries: Any) -> Adapter:
    """The adapter with other entries in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return Adapter.open(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "math"
    trained(dense_model("llama"), folder, **CASES["plain"])
    return folder


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.mark.parametrize("case", CASES)
def test_pefts_own_merge(case: str, tmp_path: Path) -> None:
    model = dense_model("llama")
    before = weights(model)
    expected = weights(trained(model, tmp_path, **CASES[case]).merge_and_unload())
    adapter = Adapter.open(tmp_path)
    found = applied(adapter, before)
    assert worst(before, expected) > 0.1, "the adapter does something"
    assert worst(expected, found) <= 1e-6
    touched = {n for n in before if n.removesuffix(".weight") in adapter.modules}
    assert all(torch.equal(found[n], before[n]) for n in before.keys() - touched)


def test_weights_stored_the_other_way_round(tmp_path: Path) -> None:
    model = tiny_gpt2()
    before = weights(model)
    asked = {"target_modules": ["c_fc", "c_proj"], "r": 3, "fan_in_fan_out": True}
    expected = weights(trained(model, tmp_path, **asked).merge_and_unload())
    assert worst(expected, applied(Adapter.open(tmp_path), before)) <= 1e-6


@pytest.mark.parametrize(
    "entries",
    [{"use_rslora": True}, {"lora_alpha": 7.01}, {"alpha_pattern": {"up_proj": 8}}],
    ids=["rslora", "alpha", "pattern"],
)
def test_a_wrong_scale_is_noticed(copied: Path, entries: dict[str, Any]) -> None:
    before = weights(dense_model("llama"))
    expected = applied(Adapter.open(copied), before)
    assert worst(expected, applied(changed(copied, **entries), before)) > 1e-4


def test_what_it_is_as_a_source(plain: Path) -> None:
    adapter = Adapter.open(str(plain))
    assert is_adapter(plain)
    assert not is_adapter(plain.parent)
    assert adapter.label == "math"
    assert adapter.weight_files == (plain / "adapter_model.safetensors",)
    assert (len(adapter.modules), len(adapter.tensors)) == (9, 18)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    (extent,) = adapter.extents(name) or ()
    data = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    assert np.frombuffer(data, np.float32).tolist() == adapter.read(name).ravel().tolist()
    assert torch.equal(torch.cat(list(adapter.stream(name))), adapter.read(name).ravel())


def test_digests_tell_adapters_apart(plain: Path, copied: Path) -> None:
    assert Adapter.open(plain).digest() == Adapter.open(copied).digest()
    assert Adapter.open(plain).digest() != changed(copied, lora_alpha=8).digest()


def test_modules_that_are_no_ffn(tmp_path: Path) -> None:
    trained(dense_model("llama"), tmp_path, target_modules=["up_proj", "q_proj", "lm_head"])
    adapter, forms = Adapter.open(tmp_path), all_architectures()
    attention = {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert set(adapter.others(forms["llama"])) == {"lm_head", *attention}
    assert set(adapter.others(forms["mixtral"])) == set(adapter.modules)


def test_missing_modules_are_named(plain: Path) -> None:
    adapter = Adapter.open(plain)
    tensors = {f"{m}.weight": a for m, (a, _) in adapter.modules.items()}
    assert adapter.missing(tensors) == ()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    assert adapter.missing(tensors) == ("model.layers.2.mlp.up_proj",)


def by_hand(folder: Path, tensors: dict[str, Tensor], **entries: Any) -> Path:
    """An adapter's folder with these A and B."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", **entries}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_one_expert_of_a_mixture(tmp_path: Path) -> None:
    """As PEFT names it where experts are modules: against A and B multiplied in fp64."""
    rng = np.random.default_rng(0)
    a, b, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 8), (6, 2), (6, 8)))
    module = "model.layers.1.mlp.experts.7.up_proj"
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.from_numpy(a),
        f"base_model.model.{module}.lora_B.weight": torch.from_numpy(b),
    }
    adapter = Adapter.open(by_hand(tmp_path / "x", tensors))
    weight = Read("w", TensorInfo.of(f"{module}.weight", "BF16", (6, 8)))
    node = adapter.applied(weight.tensor.name, weight, "a")
    half = torch.from_numpy(w).bfloat16()
    want = half.double().numpy() + 2 * b.astype(np.float64) @ a.astype(np.float64)
    found = node.apply(half, *(torch.from_numpy(x) for x in (b, a)))
    assert (node.spec.dtype, found.dtype) == ("F32", torch.float32)
    assert found.numpy() == pytest.approx(want, rel=1e-6)
    assert adapter.others(all_architectures()["qwen3_moe"]) == ()
    other = Read("w", TensorInfo.of("model.layers.1.mlp.experts.6.up_proj.weight", "BF16", (6, 8)))
    assert adapter.applied(other.tensor.name, other, "a") is other


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, b, a = (torch.randn(s, generator=generator) for s in ((300, 500), (300, 9), (9, 500)))
    leaves = [Read("s", TensorInfo.of("t", "F32", tuple(t.shape))) for t in (x, b, a)]
    node = LowRank(*leaves, 0.7)
    before = torch.get_num_threads()
    try:
        found = []
        for threads, rows in ((1, 64), (2, 64), (1, 7)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("moe_compose.surgery.lora._ROWS", rows)
            found.append(node.apply(x.clone(), b, a))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_model_of_another_shape_is_refused(plain: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"shape \[32, 48\], the adapter's B A \[48, 32\]"):
        Adapter.open(plain).applied(name, Read("w", TensorInfo.of(name, "F32", (32, 48))), "a")
    node = Adapter.open(plain).applied(name, Read("w", TensorInfo.of(name, "U8", (48, 32))), "a")
    with pytest.raises(PlanError, match="no LoRA on dtype U8"):
        _ = node.spec


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"use_dora": True}, "use_dora (True): DoRA"),
        ({"bias": "all"}, "bias (all) must be none"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save (['lm_head']): whole modules"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A is neither"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights (pissa): the model's own weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights (olora): the model's own weights"),
        ({"lora_bias": True}, "lora_bias (True): the adapter adds biases"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices ([3]): it changes rows"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_more_than_lora_is_refused(
    asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    trained(dense_model("llama"), tmp_path, **{"target_modules": FFN, "r": 2, **asked})
    with pytest.raises(UnsupportedError) as caught:
        Adapter.open(tmp_path)
    assert any(said in p for p in caught.value.problems), caught.value.problems


def test_a_head_saved_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    """PEFT does so unasked when the adapter touches it; it may have been resized or trained."""
    model = trained(dense_model("llama"), tmp_path, target_modules=["lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(UnsupportedError, match=r"lm_head\.base_layer\.weight is the model's own"):
        Adapter.open(tmp_path)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=FFN, feedforward_modules=FFN)
    saved(dense_model("llama"), config, tmp_path)
    with pytest.raises(UnsupportedError, match=r"peft_type \(IA3\) must be LORA"):
        Adapter.open(tmp_path)


def test_everything_wrong_is_named_at_once(copied: Path) -> None:
    file = copied / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second = list(tensors)[:2]
    del tensors[first]
    tensors["base_model.model.model.norm.weight"] = torch.ones(32)
    save_file(tensors, file)
    with pytest.raises(UnsupportedError) as caught:
        changed(copied, use_dora=True, bias="all", invented_later={"x": 1})
    problems = caught.value.problems
    assert len(problems) == 5, problems
    for text in ("bias", "use_dora", "invented_later", "model.norm.weight is neither", "has no"):
        assert any(text in p for p in problems)
    assert second in tensors


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"r": 4}, r"should be \[4, in\] and \[out, 4\]"),
        ({"r": 0}, "no rank and alpha"),
        ({"r": "many"}, "no rank and alpha"),
        ({"rank_pattern": {"(": 3}}, "no rank and alpha"),
        ({"rank_pattern": [3]}, "no rank and alpha"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(
    copied: Path, entries: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        changed(copied, **entries)


def test_a_folder_without_an_adapter(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config.json and no adapter_model"):
        Adapter.open(tmp_path)
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        Adapter.open(copied)
    with pytest.raises(CheckpointError):
        Checkpoint.open(copied)
