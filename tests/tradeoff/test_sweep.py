"""`sweep` and `fewest`: figures of plans that are never written, the knee, and limits.

pytest tests/tradeoff/test_sweep.py
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pruned import lively_checkpoint

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.surgery.prune_options import allowed_counts
from moe_compose.tradeoff.fewest import REPORT_NAME
from moe_compose.tradeoff.result import Candidate, curve, findings, knee, smallest_within

OPTIONS = mc.EvaluateOptions(batch=4)


def drawn(seed: int, rows: int = 8) -> TokenSet:
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 96) for _ in range(24)] for _ in range(rows)]
    return TokenSet.of_ids({"a": ids[: rows // 2], "b": ids[rows // 2 :]})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    return lively_checkpoint("mixtral", tmp_path_factory.mktemp("sweep") / "tiny")


@pytest.fixture(scope="module")
def stats(source: mc.Checkpoint) -> mc.ExpertStats:
    return mc.calibrate(source, drawn(0))


@pytest.fixture(scope="module")
def found(source: mc.Checkpoint, stats: mc.ExpertStats) -> mc.Sweep:
    asked = mc.SweepOptions(ratios=(0.2, 0.4, 0.7, 0.9), criteria=("reap", "frequency"), max_kl=9.0)
    return mc.sweep(source, stats, drawn(1), asked, evaluation=OPTIONS)


def test_figures_are_those_of_the_written_plans(
    source: mc.Checkpoint, stats: mc.ExpertStats, found: mc.Sweep, tmp_path: Path
) -> None:
    assert {(c.criterion, c.keep) for c in found.candidates} == {
        (criterion, keep) for criterion in ("reap", "frequency", "random") for keep in (5, 4, 2)
    }
    assert "ratio 0.9 would leave 1 experts" in found.notes[0]
    for c in found.candidates[::4]:
        options = mc.PruneOptions(keep=c.keep, criterion=c.criterion)  # type: ignore[arg-type]
        plan = mc.prune(source, None if c.criterion == "random" else stats, options)
        written = mc.write(plan, tmp_path / f"{c.criterion}{c.keep}")
        score = mc.evaluate(written, drawn(1), against=source, options=OPTIONS).overall
        assert (c.kl, c.loss, c.top1) == (score.kl, score.loss, score.top1)
        assert found.loss == score.reference_loss
        assert c.digest == plan.digest()
        assert c.bytes == sum(t.nbytes for t in written.tensors.values())
        assert c.parameters == plan.summary().parameters.total < found.parameters
    sizes = [c.keep for c in found.candidates]
    assert sizes == sorted(sizes, reverse=True)
    assert found.chosen is not None and found.chosen.keep == 2
    document = found.to_json()
    assert document["knee_rule"] and document["candidates"][0]["domain_kl"].keys() == {"a", "b"}
    assert any("smallest within KL 9" in text for text in findings(found))


def test_refitted_candidates(source: mc.Checkpoint, stats: mc.ExpertStats, found: mc.Sweep) -> None:
    asked = mc.SweepOptions(ratios=(0.4,), criteria=("reap",))
    fitted = drawn(2, 64)
    how = mc.RefitOptions(held_out=4)
    after = mc.sweep(source, stats, drawn(1), asked, evaluation=OPTIONS, refit=how, refit_on=fitted)
    plan = mc.prune(source, stats, mc.PruneOptions(keep=4))
    refitted = mc.refit(plan, source, fitted, how)
    score = mc.evaluate(refitted, drawn(1), against=source, options=OPTIONS).overall
    one = next(c for c in after.candidates if c.criterion == "reap")
    assert one.refitted and one.kl == score.kl
    before = next(c for c in found.candidates if (c.criterion, c.keep) == ("reap", 4))
    assert one.kl < before.kl
    with pytest.raises(mc.OptionError, match="sequences"):
        mc.sweep(source, stats, fitted, asked, evaluation=OPTIONS, refit_on=fitted)
    with pytest.raises(mc.OptionError, match="text of its own"):
        mc.sweep(source, stats, fitted, asked, evaluation=OPTIONS, refit=how)


def candidate(criterion: str, keep: int, kl: float) -> Candidate:
    return Candidate(
        criterion=criterion,
        keep=keep,
        share=keep / 16,
        refitted=False,
        parameters=keep,
        active=1,
        bytes=keep,
        loss=1.0,
        kl=kl,
        top1=1.0,
        domain_kl={},
        digest="",
    )


def test_the_knee() -> None:
    rows = [
        candidate("reap", 14, 0.02),
        candidate("frequency", 14, 0.01),
        candidate("random", 14, 0.0),  # the baseline is not on the curve
        candidate("reap", 12, 0.05),
        candidate("reap", 8, 0.5),
        candidate("reap", 4, 2.0),
    ]
    assert [(c.criterion, c.keep) for c in curve(rows)] == [
        *(("frequency", 14), ("reap", 12), ("reap", 8), ("reap", 4))
    ]
    # depths below the line from (16, 0) to (4, 2): 14: 1/6 - .005, 12: 1/3 - .025, 8: 2/3 - .25
    assert knee(rows) is rows[4]
    assert knee([*rows[:4], candidate("reap", 8, 1.5), rows[5]]) is rows[3]
    assert knee(rows[:1]) is None
    concave = [candidate("reap", 12, 1.5), candidate("reap", 8, 1.9), candidate("reap", 4, 2.0)]
    assert knee(concave) is None, "every point lies above the line"


def test_the_smallest_within() -> None:
    rows = [candidate("a", 12, 0.1), candidate("b", 8, 0.3), candidate("a", 8, 0.2)]
    assert smallest_within(rows, 0.3) is rows[2]
    assert smallest_within(rows, 0.15) is rows[0]
    assert smallest_within(rows, 0.05) is None


def test_the_fewest_experts_within_a_limit(
    source: mc.Checkpoint, stats: mc.ExpertStats, found: mc.Sweep
) -> None:
    by_count = {c.keep: c.kl for c in found.candidates if c.criterion == "reap"}
    limit = by_count[4] * 1.0001
    result = mc.fewest(source, stats, drawn(1), limit, evaluation=OPTIONS)
    assert result.options.keep == 4 and result.candidate.kl == by_count[4] <= limit
    assert result.plan.digest() == mc.prune(source, stats, result.options).digest()
    tried = result.plan.reports[REPORT_NAME]["tried"]
    assert len(tried) == len(result.tried) <= 3
    assert mc.fewest(source, stats, drawn(1), 99.0, evaluation=OPTIONS).options.keep == 2
    with pytest.raises(mc.ConditionError, match="stays within KL 1e-09"):
        mc.fewest(source, stats, drawn(1), 1e-9, evaluation=OPTIONS)
    with pytest.raises(mc.OptionError, match="leave keep, ratio and size out"):
        mc.fewest(source, stats, drawn(1), 0.1, mc.PruneOptions(keep=3))


def test_counts_that_a_router_can_do_with(source: mc.Checkpoint, tmp_path: Path) -> None:
    from moe_compose.surgery.selection import moe_form

    random_order = mc.PruneOptions(criterion="random")
    assert allowed_counts(random_order, moe_form(source)[1]) == [2, 3, 4, 5, 6]
    grouped = lively_checkpoint("deepseek_v3", tmp_path / "tiny")
    assert allowed_counts(random_order, moe_form(grouped)[1]) == [6, 8]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ratios": (0.0,)}, "ratio"),
        ({"ratios": ()}, "at least one"),
        ({"criteria": ("given",)}, "criterion"),
        ({"max_kl": 0.0}, "max_kl"),
    ],
)
def test_options(given: dict, why: str) -> None:
    with pytest.raises(mc.OptionError, match=why):
        mc.SweepOptions(**given)


def test_what_is_missing(source: mc.Checkpoint) -> None:
    with pytest.raises(mc.OptionError, match="need statistics"):
        mc.sweep(source, None, drawn(1))
    with pytest.raises(mc.OptionError, match="none of the ratios"):
        mc.sweep(source, None, drawn(1), mc.SweepOptions(ratios=(0.9,), criteria=("random",)))


def test_what_a_later_candidate_lacks_is_said_first(
    source: mc.Checkpoint, stats: mc.ExpertStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is evaluated before."""
    monkeypatch.setattr("moe_compose.tradeoff.measure.evaluate", None)
    asked = mc.SweepOptions(ratios=(0.4,), criteria=("reap", "loo-mse", "naee-greedy"))
    with pytest.raises(mc.OptionError, match="--loo-tokens 2048") as caught:
        mc.sweep(source, stats, drawn(1), asked)
    assert len(caught.value.problems) == 2
    weighted = mc.PruneOptions(criterion="naee-greedy", domain_weight=("a=2",))
    with pytest.raises(mc.OptionError, match="its order is of all text"):
        mc.fewest(source, stats, drawn(1), 0.1, weighted)


def test_masked_criteria_are_swept(source: mc.Checkpoint) -> None:
    texts = drawn(2)
    masked = mc.calibrate(source, texts, mc.CalibrateOptions(loo_tokens=64))
    asked = mc.SweepOptions(ratios=(0.4,), criteria=("loo-mse", "naee-greedy"))
    found = mc.sweep(source, masked, drawn(1), asked, evaluation=OPTIONS)
    assert {c.criterion for c in found.candidates} == {"loo-mse", "naee-greedy", "random"}
