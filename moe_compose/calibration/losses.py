"""What a pruning gives up, read off the statistics that it was decided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_compose.calibration.criteria import convergence
from moe_compose.calibration.stats import ExpertStats
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.prune import REPORT_NAME

#: What the entries mean, beside them.
MEANING = {
    "gate_mass": "share of all dispatched weight that removed experts had",
    "displaced": "share of routed (token, expert) pairs that go elsewhere",
    "random": "what either share would be, on average, of experts that are removed at random",
    "jaccard": "two halves of the text: agreement on the experts kept, 1 is the same",
    "tau": "two halves of the text: Kendall's τ of the rankings, 1 is the same",
}


def lost(
    stats: ExpertStats, kept: Mapping[int, Sequence[int]], criterion: str
) -> dict[str, dict[str, float]]:
    """Layer → what goes with the experts that are not kept, as `MEANING` says.

    Args:
        stats: the statistics.
        kept: layer → experts.
        criterion: that they were ranked by.
    """
    halves = all(stats.tokens(half=half) for half in (0, 1))
    found: dict[str, dict[str, float]] = {}
    for layer, ids in sorted(kept.items()):
        sums, experts = stats.sums(layer), stats.experts(layer)
        gone = sorted(set(range(experts)) - set(ids))
        entry = {
            "gate_mass": _share(sums["gate"], gone),
            "displaced": _share(sums["count"], gone),
            "random": len(gone) / experts,
        }
        if halves and ids:
            c = convergence(stats, layer, len(ids) / experts, criterion)
            entry |= {"jaccard": c.jaccard, "tau": c.tau}
        found[str(layer)] = entry
    return found


def with_losses(plan: Plan, stats: ExpertStats, criterion: str) -> Plan:
    """A pruning with what it gives up in its report and among its notes."""
    kept = {int(layer): ids for layer, ids in plan.decided["kept"].items()}
    layers = lost(stats, kept, criterion)
    report: dict[str, Any] = {**plan.reports[REPORT_NAME], "lost": {**MEANING, "layers": layers}}

    def mean(name: str) -> float:
        return sum(entry[name] for entry in layers.values()) / max(len(layers), 1)

    notes = plan.notes
    if mean("random") > 0:
        notes = (
            *notes,
            f"the removed experts had {mean('gate_mass'):.1%} of the dispatched weight and "
            f"{mean('displaced'):.1%} of the routed pairs of the calibration text; removed at "
            f"random they would have had {mean('random'):.1%}",
        )
    return replace(plan, reports={**plan.reports, REPORT_NAME: report}, notes=notes)


def _share(values: Any, ids: Sequence[int]) -> float:
    whole = float(values.sum())
    return float(values[list(ids)].sum()) / whole if whole else 0.0
