"""From statistics, and from weights alone, to what is kept.

pytest tests/calibration/test_pruning.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutants import mutant

import moe_compose as mc
from moe_compose.calibration.criteria import CRITERIA, MEASURED, worth
from moe_compose.calibration.pruning import check_statistics, super_experts
from moe_compose.calibration.tokens import TokenSet
from moe_compose.routing import top_indices
from moe_compose.surgery.prune_options import CRITERIA as KNOWN
from moe_compose.surgery.prune_options import WITHOUT_STATS

Tiny = Callable[..., mc.Checkpoint]


@pytest.fixture(scope="module")
def moe(tiny: Tiny) -> mc.Checkpoint:
    return tiny("mixtral")


@pytest.fixture(scope="module")
def stats(moe: mc.Checkpoint, tokens: TokenSet) -> mc.ExpertStats:
    return mc.calibrate(moe, tokens, mc.CalibrateOptions(batch=2, loo_tokens=68))


def kept(plan: object) -> dict[int, list[int]]:
    return {int(layer): ids for layer, ids in plan.decided["kept"].items()}


def test_every_criterion_of_statistics_can_be_asked_for() -> None:
    assert set(KNOWN) == set(MEASURED) | set(WITHOUT_STATS)


@pytest.mark.parametrize("criterion", MEASURED)
def test_the_best_by_each_criterion(
    criterion: str, moe: mc.Checkpoint, stats: mc.ExpertStats
) -> None:
    options = mc.PruneOptions(keep=4, criterion=criterion, super_experts="ignore")
    plan = mc.prune(moe, stats, options)
    for layer, ids in kept(plan).items():
        assert ids == sorted(top_indices(worth(stats, layer, criterion), 4).tolist())
    assert plan.decided["criterion"] == criterion
    assert plan.decided["of"]["tokens"] == {d: stats.tokens(d) for d in stats.domains}


def test_weights_of_domains(moe: mc.Checkpoint, stats: mc.ExpertStats) -> None:
    for criterion in CRITERIA:
        only = worth(stats, 1, criterion, weights={"a": 1.0, "b": 0.0})
        expected = worth(stats, 1, criterion, domain="a")
        if criterion == "easy-ep":
            expected = expected / expected.sum()
        torch.testing.assert_close(only, expected)
    doubled = worth(stats, 1, "reap", weights={"a": 2.0})
    a, b = stats.sums(1, "a"), stats.sums(1, "b")
    expected = (2 * a["gated_norm"] + b["gated_norm"]) / (2 * a["count"] + b["count"])
    torch.testing.assert_close(doubled, expected)
    torch.testing.assert_close(
        worth(stats, 1, "reap", weights={"a": 0.01, "b": 0.01}), worth(stats, 1, "reap")
    )
    weighted = mc.PruneOptions(keep=3, domain_weight=("a=0",), super_experts="ignore")
    for layer, ids in kept(mc.prune(moe, stats, weighted)).items():
        assert ids == sorted(top_indices(worth(stats, layer, "reap", domain="b"), 3).tolist())
    for entries, why in ((("x=1",), "no domain 'x'"), (("a=0", "b=0"), "every domain at 0")):
        with pytest.raises(mc.OptionError, match=why):
            mc.prune(moe, stats, mc.PruneOptions(keep=3, domain_weight=entries))


def test_super_experts_are_kept_in_the_first_three_quarters(
    moe: mc.Checkpoint, stats: mc.ExpertStats
) -> None:
    loud = {}
    for layer, sums in stats.layers.items():
        worst = int(worth(stats, layer).argmin())
        peaks = torch.zeros_like(sums.peak_HCE)
        peaks[..., worst] = 1000.0 + layer
        loud[layer] = replace(sums, peak_HCE=peaks)
    shouting = replace(stats, layers=loud)
    # the quantile of 18 values lies between the largest two: only the loudest is beyond it
    worst = int(worth(stats, 2).argmin())
    assert super_experts(shouting, 3) == {2: (worst,)}
    assert super_experts(shouting, 2) == {}
    plan = mc.prune(moe, shouting, mc.PruneOptions(keep=3))
    assert worst in kept(plan)[2]
    assert plan.decided["guarded"] == {"2": [worst]}
    plain = mc.prune(moe, shouting, mc.PruneOptions(keep=3, super_experts="ignore"))
    assert worst not in kept(plain)[2]


def test_experts_that_were_never_chosen_go_first_and_the_lower_stay(
    moe: mc.Checkpoint, stats: mc.ExpertStats
) -> None:
    silent = {
        i: replace(s, sums_HCME=s.sums_HCME * torch.tensor([0.0, 0, 0, 0, 0, 1]))
        for i, s in stats.layers.items()
    }
    options = mc.PruneOptions(keep=3, super_experts="ignore")
    for ids in kept(mc.prune(moe, replace(stats, layers=silent), options)).values():
        assert ids == [0, 1, 5]


def test_statistics_of_another_checkpoint(
    moe: mc.Checkpoint, stats: mc.ExpertStats, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(mc.CheckpointError, match="were measured on"):
        mc.prune(tiny("mixtral", num_local_experts=5), stats, mc.PruneOptions(keep=3))

    def retrained(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.block_sparse_moe.gate.weight"] *= 2

    other = mutant(moe, tmp_path / "other", tensors=retrained)
    mc.prune(other, stats, mc.PruneOptions(keep=3))  # reads no weights, so it cannot tell
    check_statistics(stats, moe)
    with pytest.raises(mc.CheckpointError, match="other weights"):
        check_statistics(stats, other)
    for criterion in ("random", "given"):
        with pytest.raises(mc.OptionError, match="statistics have no meaning"):
            mc.prune(moe, stats, mc.PruneOptions(keep=3, criterion=criterion))


def test_whether_the_text_was_enough_is_said(moe: mc.Checkpoint, stats: mc.ExpertStats) -> None:
    found = mc.prune(moe, stats, mc.PruneOptions(keep=3)).notes
    assert any("two halves of them agree" in note and "Jaccard" in note for note in found)
    assert not any("Jaccard" in n for n in mc.prune(moe, stats, mc.PruneOptions(keep=6)).notes)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "nemotron_h", "granitemoe"])
def test_aimer(family: str, tiny: Tiny) -> None:
    """Against the formula over whole experts, one by one."""
    source = tiny(family)
    ranking = mc.rank_by_weights(source)
    from moe_compose.architectures import find

    form = find(source.config)
    moe = form.moe(source.config)
    assert sorted(ranking.worths) == list(moe.sparse_layers)
    layer = moe.sparse_layers[-1]
    for e in range(moe.num_experts):
        parts = []
        for name in form.experts.names:
            w = source.read(name.format(i=layer, e=e)).double()
            rows = len(w) // moe.num_experts
            parts.append(w[e * rows : (e + 1) * rows] if form.experts.stacked else w)
        flat = torch.cat([p.flatten() for p in parts])
        expected = float(flat.abs().mean() / flat.square().mean().sqrt())
        assert -ranking.worths[layer][e] == pytest.approx(expected, rel=1e-12)
        assert expected == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    plan = mc.prune(source, ranking, mc.PruneOptions(keep=moe.num_experts, criterion="aimer"))
    assert plan.decided["criterion"] == "aimer"
    with pytest.raises(mc.OptionError, match="by aimer, not by reap"):
        mc.prune(source, ranking, mc.PruneOptions(keep=moe.num_experts))
