"""Damaged checkpoints: each one is caught by `validate`, alone or with `--against` its source.

    pytest tests/validation/test_mutants.py

The victim is a DeepSeek-V3 pruned from 8 to 6 experts in two groups: a correction bias, a scaling
factor, shared experts, a dense layer. Everything that alone shows is asked for without a source, so
the table also says what only a comparison can find.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Tensors, mutant
from pruned import lively_checkpoint
from served import tokenizer

import moe_compose as mc
from moe_compose.errors import CheckpointError
from moe_compose.validation.report import ValidationReport

ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
EXPERT_5, EXPERT_6 = (f"layers.1.mlp.experts.{e}." for e in (5, 6))
UP = EXPERT.format(2, "up")
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    sizes = {"vocab_size": 384, "first_k_dense_replace": 1}
    made = lively_checkpoint("deepseek_v3", folder, **sizes, tie_word_embeddings=False)
    tokenizer(folder)

    def norms(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, t in tensors.items():
            if "norm" in name:
                t += 0.3 * torch.randn(t.shape, generator=generator)

    return mutant(made, folder.with_name("norms"), norms, edit(num_nextn_predict_layers=0))


@pytest.fixture(scope="module")
def victim(source: mc.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    plan = mc.prune(source, None, mc.PruneOptions(keep=6, criterion="random"))
    return mc.write(plan, tmp_path_factory.mktemp("victim") / "out")


def test_the_victim_is_sound(source: mc.Checkpoint, victim: mc.Checkpoint) -> None:
    report = mc.validate(victim, against=source, tokens=64)
    assert report.ok
    bad = [c.name for c in report.checks if c.status in ("fail", "warn")]
    assert bad in ([], ["portability"] * len(bad))


# Ways to damage tensors.

Change = Callable[[Tensors], object]


def pop(*names: str) -> Change:
    return lambda t: [t.pop(n) for n in names]


def put(name: str, value: torch.Tensor) -> Change:
    return lambda t: t.__setitem__(name, value)


def fill(name: str, value: float, at: Any = ...) -> Change:
    return lambda t: t[name].__setitem__(at, value)


def rename(part: str, other: str) -> Change:
    return lambda t: [t.__setitem__(n.replace(part, other), t.pop(n)) for n in list(t) if part in n]


def swap(part: str, other: str, where: str = "model.layers.1.") -> Change:
    def change(t: Tensors) -> None:
        pairs = [(n, n.replace(part, other)) for n in t if part in n and n.startswith(where)]
        assert pairs
        for a, b in pairs:
            t[a], t[b] = t[b], t[a]

    return change


def copy(part: str, other: str) -> Change:
    def change(t: Tensors) -> None:
        for name in [n for n in t if part in n]:
            t[name.replace(part, other)] = t[name].clone()

    return change


def become(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda t: t.__setitem__(name, value(t[name]))


#: Fault → what is done, the check that fails, and a problem that it names.
TENSORS_ALONE: dict[str, tuple[Change, str, str]] = {
    "missing router": (pop(ROUTER), "tensors", f"{ROUTER} is missing"),
    "missing expert": (
        pop(*(EXPERT.format(5, x) for x in ("gate", "up", "down"))),
        "tensors",
        "experts.5.down_proj.weight is missing",
    ),
    "missing matrix": (pop(UP), "tensors", f"{UP} is missing"),
    "surplus expert": (copy(EXPERT_5, EXPERT_6), "tensors", f"{EXPERT_6}up_proj.weight is unexp"),
    "gap in the numbers": (rename(EXPERT_5, EXPERT_6), "tensors", f"{EXPERT_5}up_proj.weight is m"),
    "names of another family": (rename(".mlp.", ".block_sparse_moe."), "tensors", "is missing"),
    "a prefix too many": (rename("model.l", "model.model.l"), "tensors", "is missing"),
    "stacked experts": (
        put("model.layers.1.mlp.experts.gate_up_proj", torch.randn(6, 48, 32)),
        "tensors",
        "gate_up_proj is unexpected",
    ),
    "wrong shape": (put(UP, torch.randn(20, 32)), "tensors", "[20, 32], not [24, 32]"),
    "transposed": (become(UP, lambda t: t.T), "tensors", "[32, 24], not [24, 32]"),
    "flattened": (become(UP, lambda t: t.flatten()), "tensors", "[768], not [24, 32]"),
    "short router": (become(ROUTER, lambda t: t[:5]), "tensors", "[5, 32], not [6, 32]"),
    "unpruned router": (put(ROUTER, torch.randn(8, 32)), "tensors", "[8, 32], not [6, 32]"),
    "lost correction bias": (pop(BIAS), "tensors", f"{BIAS} is missing"),
    "lost norm": (pop(NORM), "tensors", f"{NORM} is missing"),
    "lost head": (pop("lm_head.weight"), "tensors", "lm_head.weight is missing"),
    "extra layer": (copy("model.layers.2.", "model.layers.3."), "tensors", "model.layers.3"),
    "one NaN": (fill(UP, torch.nan, (3, 4)), "values", f"{UP} holds NaN"),
    "one infinity": (fill(UP, torch.inf, (0, 0)), "values", f"{UP} holds NaN or inf"),
    "minus infinity in a router": (fill(ROUTER, -torch.inf, 3), "values", f"{ROUTER} holds NaN or"),
    "zero matrix": (fill(UP, 0.0), "values", f"{UP} is 0 throughout"),
    "zero router": (fill(ROUTER, 0.0), "values", f"{ROUTER} is 0 throughout"),
    "rounded correction bias": (become(BIAS, torch.Tensor.bfloat16), "dtypes", BIAS),
    "weights as integers": (become(UP, lambda t: t.view(torch.int32)), "tensors", f"{UP} is I32"),
}  # fmt: skip


def failed(report: ValidationReport) -> dict[str, str]:
    """Failed check → its detail and problems."""
    return {c.name: " ".join((c.detail, *c.problems)) for c in report.checks if c.status == "fail"}


@pytest.mark.parametrize("fault", TENSORS_ALONE)
def test_damaged_tensors(fault: str, victim: mc.Checkpoint, tmp_path: Path) -> None:
    change, check, text = TENSORS_ALONE[fault]
    report = mc.validate(mutant(victim, tmp_path / "m", tensors=change))
    assert not report.ok
    assert text in failed(report)[check]


#: Fault that a checkpoint may have on purpose → what is done, the check that warns, and of what.
TENSORS_NOTICED: dict[str, tuple[Change, str, str]] = {
    "fresh correction bias": (fill(BIAS, 0.0), "values", f"{BIAS} is 0 throughout"),
    "a matrix in 16 bits": (become(UP, torch.Tensor.bfloat16), "dtypes", f"{UP} is bfloat16"),
}


@pytest.mark.parametrize("fault", TENSORS_NOTICED)
def test_odd_tensors(fault: str, victim: mc.Checkpoint, tmp_path: Path) -> None:
    change, name, text = TENSORS_NOTICED[fault]
    report = mc.validate(mutant(victim, tmp_path / "m", tensors=change))
    found = {c.name: c.problems for c in report.checks if c.status == "warn"}
    assert text in found[name]


def edit(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c.update(changes)


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda c: [c.pop(k, None) for k in keys]


#: Fault → what is done to config.json, and the check that fails.
CONFIG_ALONE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unpruned count": (edit(n_routed_experts=8), "tensors"),
    "count too small": (edit(n_routed_experts=4), "tensors"),
    "more layers": (edit(num_hidden_layers=4), "tensors"),
    "fewer layers": (edit(num_hidden_layers=2), "tensors"),
    "more dense layers": (edit(first_k_dense_replace=2), "tensors"),
    "another expert width": (edit(moe_intermediate_size=16), "tensors"),
    "another count of shared experts": (edit(n_shared_experts=1), "tensors"),
    "another vocabulary": (edit(vocab_size=400), "tensors"),
    "another head size": (edit(v_head_dim=8), "tensors"),
    "head tied to embeddings": (edit(tie_word_embeddings=True), "ties"),
    "more experts chosen than there are": (edit(num_experts_per_tok=7), "routing"),
    "more experts chosen than groups hold": (edit(num_experts_per_tok=4), "routing"),
    "groups that do not divide": (edit(n_group=4), "routing"),
    "another class": (edit(architectures=["MixtralForCausalLM"]), "config"),
    "no class": (without("architectures"), "config"),
    "an unknown family": (edit(model_type="nonsense"), "config"),
    "another family": (edit(model_type="glm4_moe"), "config"),
    "vocabulary as text": (edit(vocab_size="384"), "config"),
}


@pytest.mark.parametrize("fault", CONFIG_ALONE)
def test_damaged_configs(fault: str, victim: mc.Checkpoint, tmp_path: Path) -> None:
    change, check = CONFIG_ALONE[fault]
    report = mc.validate(mutant(victim, tmp_path / "m", config=change))
    assert not report.ok
    assert check in failed(report)


def both(theta: float) -> Callable[[dict[str, Any]], object]:
    def change(c: dict[str, Any]) -> None:
        c["rope_theta"] = theta
        if c.get("rope_parameters"):
            c["rope_parameters"]["rope_theta"] = theta

    return change


#: What only a comparison finds: the checkpoint is whole, and another model.
AGAINST: dict[str, dict[str, Any]] = {
    "swapped experts": {"tensors": swap("experts.0.", "experts.1.")},
    "swapped gate and up": {"tensors": swap("experts.0.gate_proj", "experts.0.up_proj")},
    "duplicated expert": {"tensors": copy("layers.1.mlp.experts.0.", "layers.1.mlp.experts.1.")},
    "an expert scaled": {"tensors": become(UP, lambda t: t * 1.01)},
    "a matrix rounded to 16 bits": {"tensors": become(UP, lambda t: t.bfloat16().float())},
    "router rows moved by one": {"tensors": become(ROUTER, lambda t: t.roll(1, 0))},
    "one row of the router lost": {"tensors": fill(ROUTER, 0.0, 2)},
    "correction bias moved by one": {"tensors": become(BIAS, lambda t: t.roll(1, 0))},
    "correction bias forgotten": {"tensors": fill(BIAS, 0.0)},
    "wrong top_k": {"config": edit(num_experts_per_tok=2)},
    "wrong norm_topk_prob": {"config": edit(norm_topk_prob=False)},
    "wrong scaling factor": {"config": edit(routed_scaling_factor=1.0)},
    "wrong groups": {"config": edit(n_group=1)},
    "wrong rope theta": {"config": both(777.0)},
    "wrong epsilon": {"config": edit(rms_norm_eps=1e-2)},
    "wrong activation": {"config": edit(hidden_act="gelu")},
    "wrong rope layout": {"config": edit(rope_interleave=False)},
}


@pytest.mark.parametrize("fault", AGAINST)
def test_another_model(
    fault: str, source: mc.Checkpoint, victim: mc.Checkpoint, tmp_path: Path
) -> None:
    broken = mutant(victim, tmp_path / "m", **AGAINST[fault])
    report = mc.validate(broken, against=source, tokens=48)
    assert report.receipt is not None and not report.receipt.met


#: What surgery copied is compared bit for bit.
COPIES: dict[str, Change] = {
    "swapped layers": swap("layers.1.", "layers.2."),
    "duplicated layer": copy("model.layers.1.", "model.layers.2."),
    "a norm left fresh": fill(NORM, 1.0),
    "one value": fill("lm_head.weight", 0.5, (7, 7)),
}


@pytest.mark.parametrize("fault", COPIES)
def test_changed_copies(
    fault: str, source: mc.Checkpoint, victim: mc.Checkpoint, tmp_path: Path
) -> None:
    broken = mutant(victim, tmp_path / "m", tensors=COPIES[fault])
    assert "copies" in failed(mc.validate(broken, against=source))


# Damaged files.


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-64])


def lie_of_dtype(folder: Path) -> None:
    """The header calls four bytes a value two."""
    rewrite_header(folder, lambda h: h[UP].__setitem__("dtype", "BF16"))


def overlap(folder: Path) -> None:
    other = EXPERT.format(3, "up")
    rewrite_header(folder, lambda h: h[UP].__setitem__("data_offsets", h[other]["data_offsets"]))


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def index(folder: Path, **moved: str) -> dict[str, Any]:
    file = next(folder.glob("*.safetensors"))
    names = mc.Checkpoint.open(folder).tensors
    return {"metadata": {}, "weight_map": {n: moved.get(n, file.name) for n in names}}


def absent_file(folder: Path) -> None:
    found = index(folder, **{UP: "model-00002-of-00002.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(found))
    next(folder.glob("*.safetensors")).rename(folder / "model-00001-of-00002.safetensors")


def wrong_file(folder: Path) -> None:
    """The index promises a tensor that its file does not hold."""
    found = index(folder)
    found["weight_map"]["model.layers.9.mlp.gate.weight"] = "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(found))


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(found))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_tokenizers(source: mc.Checkpoint, victim: mc.Checkpoint, tmp_path: Path) -> None:
    """A missing one, a broken one, one of other tokens, one of more tokens than the model has."""

    def status(damage: Callable[[Path], object], against: mc.Checkpoint | None = None) -> str:
        folder = mutant(victim, tmp_path / str(len(list(tmp_path.iterdir())))).path
        assert folder is not None
        damage(folder)
        report = mc.validate(mc.Checkpoint.open(folder), against=against, tokens=16)
        return next(c.status for c in report.checks if c.name == "tokenizer")

    assert status(lambda folder: None, source) == "pass"
    assert status(no_tokenizer) == "warn"
    assert status(no_tokenizer, source) == "fail"
    assert status(other_tokenizer) == "pass"
    assert status(other_tokenizer, source) == "warn"
    assert status(lambda folder: (folder / "tokenizer.json").write_text("{")) == "fail"


def half_a_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:200])


#: Those that cannot even be opened.
UNREADABLE: dict[str, Callable[[Path], object]] = {
    "truncated weights": truncate,
    "empty weights": lambda f: next(f.glob("*.safetensors")).write_bytes(b""),
    "no weights": lambda f: next(f.glob("*.safetensors")).unlink(),
    "a lie about a dtype": lie_of_dtype,
    "tensors that overlap": overlap,
    "an index that names an absent file": absent_file,
    "an index that names an absent tensor": wrong_file,
    "half a config": half_a_config,
    "no config": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_damaged_files(fault: str, victim: mc.Checkpoint, tmp_path: Path) -> None:
    folder = mutant(victim, tmp_path / "m").path
    assert folder is not None
    UNREADABLE[fault](folder)
    with pytest.raises(CheckpointError):
        mc.validate(mc.Checkpoint.open(folder))
