"""`validate --against` of a pruned checkpoint: it is the source with those experts masked, or not.

pytest tests/validation/test_masked.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mutants import mutant
from pruned import error, lively_checkpoint, masked_run, run
from streamed import make_batches

import moe_compose as mc
from moe_compose.architectures import find
from moe_compose.errors import UnsupportedError
from moe_compose.routing import route, router_logits
from moe_compose.runtime import Layer, Runner
from moe_compose.validation import parity
from moe_compose.validation.masked import Masked, masking
from moe_compose.validation.report import Agreement, ValidationReport

BATCHES = make_batches()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    return lively_checkpoint("minimax_m2", tmp_path_factory.mktemp("masked") / "tiny")


@pytest.fixture(scope="module")
def pruned(source: mc.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    plan = mc.prune(source, None, mc.PruneOptions(keep=4, criterion="random"))
    return mc.write(plan, tmp_path_factory.mktemp("pruned") / "out")


def validated(checkpoint: mc.Checkpoint, against: mc.Checkpoint, tokens: int = 96):
    report: ValidationReport = mc.validate(checkpoint, against=against, tokens=tokens)
    assert report.receipt is not None, report.checks
    return report


def test_a_pruned_checkpoint_is_its_source_with_experts_masked(
    source: mc.Checkpoint, pruned: mc.Checkpoint
) -> None:
    report = validated(pruned, source)
    assert report.ok
    assert report.receipt.masked.relative_error <= 1e-6
    assert report.receipt.verdict.startswith("exactly the source with the removed experts masked")
    assert report.receipt.agreements[0].relative_error > 1e-2
    assert report.to_json()["receipt"]["masked"]["dtype"] == "float32"


def test_a_plan_too(source: mc.Checkpoint) -> None:
    plan = mc.prune(source, None, mc.PruneOptions(keep=3, criterion="random"))
    assert validated(plan, source).receipt.masked.relative_error <= 1e-6


def router_rows(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[name] = tensors[name].roll(1, 0)


def an_expert(tensors: dict[str, torch.Tensor]) -> None:
    at = "model.layers.2.block_sparse_moe.experts"
    tensors[f"{at}.0.w2.weight"] = tensors[f"{at}.1.w2.weight"]


def a_bias(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    tensors[name] = tensors[name].roll(1, 0)


@pytest.mark.parametrize("fault", [router_rows, an_expert, a_bias])
def test_controls(fault, source: mc.Checkpoint, pruned: mc.Checkpoint, tmp_path: Path) -> None:
    broken = mutant(pruned, tmp_path / "broken", tensors=fault)
    report = validated(broken, source)
    assert not report.ok
    assert "NOT the source with the removed experts masked" in report.receipt.verdict
    assert report.receipt.masked.dtype == "float64"  # asked again, to be sure


def test_a_record_that_names_other_experts(
    source: mc.Checkpoint, pruned: mc.Checkpoint, tmp_path: Path
) -> None:
    other = mutant(pruned, tmp_path / "other")
    path = other.path / "moe_compose.json"
    history = json.loads(path.read_text())
    kept = history[-1]["decided"]["kept"]["1"]
    gone = next(e for e in range(6) if e not in kept)
    history[-1]["decided"]["kept"]["1"] = sorted([*kept[1:], gone])
    path.write_text(json.dumps(history))
    assert not validated(mc.Checkpoint.open(other.path), source).ok
    history[-1]["decided"]["kept"]["1"] = ["some"]
    path.write_text(json.dumps(history))
    with pytest.raises(mc.CheckpointError, match="no numbers"):
        mc.validate(mc.Checkpoint.open(other.path), against=source)


def test_against_something_else_only_the_loss_is_compared(
    pruned: mc.Checkpoint, tmp_path: Path
) -> None:
    other = lively_checkpoint("minimax_m2", tmp_path / "other", rope_theta=777.0)
    assert validated(pruned, other).receipt.masked is None


def test_ties_are_broken_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Agreement("float64", 0, 1e-9, 0, 0, 1, 1, 1, 1)
    assert parity.judge_masked(same, 1e-6)[0]
    assert not parity.judge_masked(Agreement("float64", 0, 1e-3, 0, 0, 1, 1, 1, 1), 1e-6)[0]
    nan = float("nan")
    assert not parity.judge_masked(Agreement("float64", 0, nan, 0, 0, 1, 1, 1, 1), 1e-6)[0]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_what_reaches_the_experts_is_what_the_reference_routes(family: str, tmp_path: Path) -> None:
    """The mask against `routing.route` over the kept experts alone, recomputed by hand."""
    source = lively_checkpoint(family, tmp_path / "tiny")
    form = find(source.config)
    moe = form.moe(source.config)
    ids = [e for e in range(moe.num_experts) if e % 4 != 1]
    kept = dict.fromkeys(moe.sparse_layers, ids)
    seen: dict[int, dict[str, object]] = {}

    def watch(layer: Layer):
        if layer.experts is not None:
            note = seen.setdefault(layer.index, {})
            layer.router.register_forward_pre_hook(
                lambda m, args: note.__setitem__("x", args[0].flatten(0, -2))
            )
            layer.experts.register_forward_pre_hook(
                lambda m, args, kwargs: note.__setitem__("routed", (*args, *kwargs.values())),
                with_kwargs=True,
            )
        return masking(source, kept)(layer)

    run(Masked(source, kept), [BATCHES[1].ids], on_layer=watch)
    for layer, note in seen.items():
        read = {t.kind: source.read(t.name.format(i=layer)) for t in form.router}
        bias = read.get("bias")
        logits = router_logits(note["x"], read["weight"][ids], None if bias is None else bias[ids])
        correction = read.get("correction_bias")
        correction = None if correction is None else correction.flatten()[ids]
        expected = route(logits, moe.routing, moe.top_k, correction_bias_E=correction)
        _, experts, weights = note["routed"][:3]
        table = torch.zeros(len(logits), moe.num_experts)
        mine = table.scatter(1, torch.tensor(ids)[expected.experts_TK], expected.weights_TK)
        torch.testing.assert_close(table.scatter(1, experts, weights.float()), mine)


def test_a_router_that_multiplies_in_a_way_of_its_own(
    source: mc.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {layer: [0, 1, 2] for layer in range(3)}
    runner = Runner(Masked(source, kept))
    router = type(runner.layers[0].router)
    original = router.forward

    def forward(self, x, *rest):
        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda a, w, b=None: a @ w.T)
        try:
            return original(self, x, *rest)
        finally:
            monkeypatch.setattr(torch.nn.functional, "linear", linear)

    monkeypatch.setattr(router, "forward", forward)
    with pytest.raises(UnsupportedError, match="cannot be masked"):
        runner.run([torch.tensor([[5, 6]])], on_layer=masking(source, kept))


def test_nothing_masked_is_the_source(source: mc.Checkpoint) -> None:
    everything = dict.fromkeys(range(3), range(6))
    assert error(masked_run(source, everything, BATCHES), run(source, BATCHES)) == 0
