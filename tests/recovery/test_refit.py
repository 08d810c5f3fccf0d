"""`refit`: a solution that is known, layers that gain or stay, families, and what is refused.

pytest tests/recovery/test_refit.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutant
from pruned import error, lively_checkpoint, run
from streamed import make_batches
from torch import Tensor

import moe_compose as mc
from moe_compose.calibration.data import DataFile
from moe_compose.calibration.tokens import TokenSet
from moe_compose.recovery import layer as one_layer
from moe_compose.recovery.refit import REPORT_NAME
from moe_compose.recovery.ridge import fit
from moe_compose.recovery.texts import held_out
from moe_compose.tradeoff.measure import check_apart

BATCHES = make_batches()
LAYERS = range(3)


def pruned(source: mc.Checkpoint, keep: int = 4) -> mc.Plan:
    return mc.prune(source, None, mc.PruneOptions(keep=keep, criterion="random"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    folder = tmp_path_factory.mktemp("refit") / "tiny"
    return lively_checkpoint("qwen3_moe", folder, decoder_sparse_step=1)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    """Top-1 of four; 1 and 3 win over 0 and 2 wherever these would be chosen, and differ from them
    in the down-projection only. So a pruning that keeps 0 and 2 can be mended whole.
    """
    folder = tmp_path_factory.mktemp("twins")
    changes = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}
    made = lively_checkpoint("qwen3_moe", folder / "plain", decoder_sparse_step=1, **changes)

    def twin(tensors: dict[str, Tensor]) -> None:
        for i in LAYERS:
            at = f"model.layers.{i}.mlp"
            row = tensors[f"{at}.gate.weight"][0]
            tensors[f"{at}.gate.weight"] = torch.stack([row, 2 * row, -row, -2 * row])
            for kept, gone in ((0, 1), (2, 3)):
                for name in ("gate_proj", "up_proj"):
                    matrix = tensors[f"{at}.experts.{kept}.{name}.weight"]
                    tensors[f"{at}.experts.{gone}.{name}.weight"] = matrix.clone()

    return mutant(made, folder / "twins", tensors=twin)


def test_a_known_solution_is_found(twins: mc.Checkpoint, tokens: TokenSet) -> None:
    orders = {i: [0, 2, 1, 3] for i in LAYERS}
    plan = mc.prune(twins, orders, mc.PruneOptions(keep=2, criterion="given"))
    found = mc.refit(plan, twins, tokens, mc.RefitOptions(ridge=1e-10, sweeps=1, held_out=4))
    for i in LAYERS:
        entry = found.reports[REPORT_NAME]["layers"][str(i)]
        assert entry["changed"] and entry["before"] > 0.5 and entry["after"] < 1e-4
        assert entry["experts"]
        for new, old in ((e, 2 * e + 1) for e in entry["experts"]):
            mended = found.read(f"model.layers.{i}.mlp.experts.{new}.down_proj.weight")
            wanted = twins.read(f"model.layers.{i}.mlp.experts.{old}.down_proj.weight")
            torch.testing.assert_close(mended, wanted, rtol=1e-3, atol=1e-4)
    before, after = (error(run(p, BATCHES), run(twins, BATCHES)) for p in (plan, found))
    assert before > 0.1 and after < 1e-3


def test_layers_gain_on_held_out_text_or_stay(
    source: mc.Checkpoint, tokens: TokenSet, options: mc.RefitOptions
) -> None:
    plan = pruned(source)
    found = mc.refit(plan, source, tokens, options)
    layers = found.reports[REPORT_NAME]["layers"]
    assert layers.keys() == {"0", "1", "2"}
    assert any(entry["changed"] for entry in layers.values())
    for i, entry in layers.items():
        assert entry["changed"] == (entry["after"] < entry["before"])
        assert entry["fitted_after"] < entry["fitted_before"]
        downs = [n for n in plan.tensors if f"layers.{i}.mlp.experts" in n and "down" in n]
        moved = [n for n in downs if not torch.equal(plan.read(n), found.read(n))]
        assert len(moved) == (len(entry["experts"]) if entry["changed"] else 0)
    assert found.decided["layers"] == layers
    assert "pruning.json" in found.reports
    assert "down-projections refitted" in str(found.preservation)
    others = [n for n in plan.tensors if "down_proj" not in n]
    assert all(plan.extents(n) == found.extents(n) for n in others), "the same bytes"


def apart(model: Any, source: mc.Checkpoint, tokens: TokenSet, every: int, layer: int = 0) -> float:
    """Error of a layer's routed output on held-out sequences, by plain hooks and without padding;
    of the first sparse layer, whose inputs are the same in both models.
    """
    held = sorted(held_out(tokens, every))
    batches = [torch.tensor([tokens.sequences[i].ids]) for i in held]

    def routed(model: Any) -> Tensor:
        seen: list[Tensor] = []

        def take(module: Any, args: Any, output: Tensor) -> None:
            seen.append(output.reshape(-1, output.shape[-1]).double())

        def watch(now: Any) -> None:
            if now.index == layer:
                now.experts.register_forward_hook(take)

        run(model, batches, on_layer=watch)
        return torch.cat(seen)

    wanted = routed(source)
    return float((routed(model) - wanted).norm() / wanted.norm())


def test_errors_are_those_of_the_routed_output(
    source: mc.Checkpoint, tokens: TokenSet, options: mc.RefitOptions
) -> None:
    plan = pruned(source)
    found = mc.refit(plan, source, tokens, options)
    entry = found.reports[REPORT_NAME]["layers"]["0"]
    for name, model in (("before", plan), ("after", found)):
        assert apart(model, source, tokens, 4) == pytest.approx(entry[name], rel=1e-4)


def test_what_makes_it_worse_is_not_taken(
    source: mc.Checkpoint,
    tokens: TokenSet,
    options: mc.RefitOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def backwards(*args: Any, **rest: Any) -> dict[int, Tensor]:
        return {e: -delta for e, delta in fit(*args, **rest).items()}

    monkeypatch.setattr(one_layer, "fit", backwards)
    plan = pruned(source)
    assert mc.refit(plan, source, tokens, options) is plan


def test_experts_that_return_something_else_are_refused(
    source: mc.Checkpoint,
    tokens: TokenSet,
    options: mc.RefitOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = one_layer.experts_of
    monkeypatch.setattr(one_layer, "experts_of", lambda m: lambda e, x: 1.2 * real(m)(e, x))
    with pytest.raises(mc.UnsupportedError, match="something else than the weighted sum"):
        mc.refit(pruned(source), source, tokens, options)


def test_the_same_every_time_and_written(
    source: mc.Checkpoint, tokens: TokenSet, options: mc.RefitOptions, tmp_path: Path
) -> None:
    plan = pruned(source)
    first, again = (mc.refit(plan, source, tokens, options) for _ in range(2))
    assert first.digest() == again.digest() != plan.digest()
    other = mc.refit(plan, source, tokens, replace(options, ridge=0.1))
    assert other.digest() != first.digest()
    kept = mc.refit(plan, source, tokens, options, folder=tmp_path / "changed")
    assert kept.digest() == first.digest()
    assert {p.suffix for p in (tmp_path / "changed").iterdir()} == {".json", ".safetensors"}
    written = mc.write(first, tmp_path / "out")
    assert error(run(written, BATCHES), run(first, BATCHES)) == 0
    assert (tmp_path / "out" / REPORT_NAME).is_file()
    report = mc.validate(written, against=source, tokens=64)
    assert report.ok, report.checks
    assert report.receipt is not None and report.receipt.masked is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(x in card for x in ("prune, refit with 4 experts", "--refit", "--refit-tokens"))


@pytest.mark.parametrize(
    ("family", "keep"),
    [("mixtral", 4), ("gpt_oss", 4), ("granitemoe", 4), ("deepseek_v3", 6), ("qwen2_moe", 4)],
)
def test_families(
    family: str, keep: int, tokens: TokenSet, options: mc.RefitOptions, tmp_path: Path
) -> None:
    """Single and stacked experts, transposed ones, with biases, groups, shared experts."""
    source = lively_checkpoint(family, tmp_path / "tiny")
    plan = pruned(source, keep)
    found = mc.refit(plan, source, tokens, options)
    layers = found.reports[REPORT_NAME]["layers"]
    first = min(map(int, layers))
    assert layers[str(first)]["changed"]
    written = mc.write(found, tmp_path / "out")
    assert error(run(written, BATCHES), run(found, BATCHES)) == 0
    for name, model in (("before", plan), ("after", written)):
        expected = pytest.approx(layers[str(first)][name], rel=1e-4)
        assert apart(model, source, tokens, 4, first) == expected


def test_bf16_is_rounded_once(tokens: TokenSet, options: mc.RefitOptions, tmp_path: Path) -> None:
    made = lively_checkpoint("mixtral", tmp_path / "tiny")

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    source = mutant(made, tmp_path / "bf16", tensors=narrow)
    found = mc.refit(pruned(source), source, tokens, options)
    assert {t.dtype for t in found.tensors.values()} == {"BF16"}
    entry = found.reports[REPORT_NAME]["layers"]["0"]
    assert entry["changed"]
    # errors are those of the rounded matrices
    assert apart(found, source, tokens, 4) == pytest.approx(entry["after"], rel=1e-4)


def test_experts_without_a_layout_are_refused(tokens: TokenSet, tmp_path: Path) -> None:
    source = lively_checkpoint("dbrx", tmp_path / "tiny")
    with pytest.raises(mc.UnsupportedError, match="not two matrices"):
        mc.refit(pruned(source), source, tokens)


def test_few_tokens_leave_experts_as_they_are(source: mc.Checkpoint, options: Any) -> None:
    few = TokenSet.of_ids({"a": [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]})
    plan = pruned(source)
    assert mc.refit(plan, source, few, options) is plan


def test_quantised_experts_are_refused(
    source: mc.Checkpoint, tokens: TokenSet, tmp_path: Path
) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "down_proj" in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    narrow = mutant(source, tmp_path / "fp8", tensors=quantise)
    with pytest.raises(mc.UnsupportedError, match=r"F8_E4M3.*rounded away"):
        mc.refit(pruned(narrow), narrow, tokens)


def test_weights_on_the_input_are_refused(tokens: TokenSet, tmp_path: Path) -> None:
    source = lively_checkpoint("llama4_text", tmp_path / "tiny")
    keep = source.config["num_local_experts"] - 1
    with pytest.raises(mc.UnsupportedError, match="their input"):
        mc.refit(pruned(source, keep), source, tokens)


def test_what_is_held_out(tokens: TokenSet) -> None:
    held = held_out(tokens, 4)
    assert {tokens.sequences[i].domain for i in held} == {0, 1}
    assert len(held) == 16 // 4 + 12 // 4
    row = [7, 8, 9]
    twice = TokenSet.of_ids({"a": [row, [1, 2, 3], row, [4, 5, 6]], "b": [[9, 9]]})
    assert held_out(twice, 3) == {0, 2}, "equal sequences go together"
    with pytest.raises(mc.OptionError, match="fitted and held-out"):
        held_out(TokenSet.of_ids({"a": [row, row]}), 8)


def test_domains_without_text_are_named(
    source: mc.Checkpoint, tokens: TokenSet, options: mc.RefitOptions
) -> None:
    plan = mc.prune(source, mc.calibrate(source, tokens), mc.PruneOptions(keep=4))
    of_a = tuple(s for s in tokens.sequences if s.domain == 0)
    only_a = replace(tokens, domains=("a",), files=((),), sequences=of_a)
    said = "refitted without text of b,"
    assert any(said in note for note in mc.refit(plan, source, only_a, options).notes)
    assert not any(said in note for note in mc.refit(plan, source, tokens, options).notes)


def test_text_that_is_fitted_to_is_not_judged_on(tokens: TokenSet) -> None:
    other = TokenSet.of_ids({"c": [[90, 91, 92]]})
    check_apart(tokens, other)
    with pytest.raises(mc.OptionError, match="28 sequences"):
        check_apart(tokens, tokens)
    file = DataFile("a.txt", "0" * 64, 3)
    a, b = (replace(x, files=((file,), *x.files[1:])) for x in (tokens, other))
    with pytest.raises(mc.OptionError, match=r"files a\.txt"):
        check_apart(a, b)


@pytest.mark.parametrize(
    ("given", "why"),
    [({"ridge": 0.0}, "ridge"), ({"sweeps": 0}, "sweeps"), ({"held_out": 1}, "held_out")],
)
def test_options(given: dict[str, Any], why: str) -> None:
    with pytest.raises(mc.OptionError, match=why):
        mc.RefitOptions(**given)


def test_merged_experts_too(
    source: mc.Checkpoint, tokens: TokenSet, options: mc.RefitOptions, tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    how = mc.CalibrateOptions(similarity=True, sample=64)
    stats = mc.calibrate(source, tokens, how, output=tmp_path / "stats")
    plan = mc.merge(source, stats, mc.MergeOptions(keep=4))
    found = mc.refit(plan, source, tokens, options)
    entry = found.reports[REPORT_NAME]["layers"]["0"]
    assert entry["changed"]
    for name, model in (("before", plan), ("after", found)):
        assert apart(model, source, tokens, 4) == pytest.approx(entry[name], rel=1e-4)
