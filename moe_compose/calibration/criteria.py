"""From sums to a worth of every expert, and whether two halves of the data agree on it.

The larger, the more an expert is worth (METHODS section 5). Experts that no token was sent to are
worth 0 by every criterion; ties go to the lower index. `naee-greedy` is an order and no sum: its
worth is the step in which an expert goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compose.calibration.stats import ExpertStats
from moe_compose.errors import OptionError
from moe_compose.routing import top_indices
from moe_compose.surgery.prune_options import GREEDY_EXPERTS

Sums = Mapping[str, Tensor]


def _mean(measure: str) -> Callable[[Sums], Tensor]:
    return lambda s: s[measure] / torch.where(s["count"] > 0, s["count"], 1.0)


#: Criterion → its formula over the measures.
CRITERIA: Mapping[str, Callable[[Sums], Tensor]] = {
    "reap": _mean("gated_norm"),  # 2510.13999, eq. 9
    "frequency": lambda s: s["count"],
    "gate-sum": lambda s: s["gate"],  # SEER-MoE, 2404.05089
    "ean-sum": lambda s: s["norm"],  # 2504.05586
    "ean-mean": _mean("norm"),
    "ean-mean-sq": _mean("norm_sq"),  # 2606.15716
    "weighted-ean": lambda s: s["gated_norm"],
    "easy-ep": lambda s: s["easy_ep"],  # 2504.06792
    "loo-mse": lambda s: s["loo"],  # NVIDIA Model-Optimizer
}

_MASK = "Measure with moe-compose calibrate --loo-tokens 2048."

#: All criteria of statistics.
MEASURED = (*CRITERIA, "naee-greedy")  # 2402.14800


@dataclass(frozen=True, slots=True)
class Convergence:
    """How far two halves of the data agree on a layer's experts.

    Attributes:
        jaccard: of the two sets that would be kept, |A ∩ B| / |A ∪ B|; 1: the same sets.
        tau: Kendall's τ-b of the two rankings; 1: the same order, 0: unrelated.
    """

    jaccard: float
    tau: float


def worth(
    stats: ExpertStats,
    layer: int,
    criterion: str = "reap",
    *,
    domain: str | None = None,
    half: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    """Worth of a layer's experts, `[E]`, fp64.

    `easy-ep` over several domains sums each domain's worth divided by its total, as its authors do
    for mixed domains; the others sum the measures. `weights` multiply what is summed, by domain; 1
    where they name none. `naee-greedy` is of all domains alike.

    Raises:
        OptionError: no such criterion, layer, domain or half; or experts were not masked.
    """
    if criterion not in MEASURED:
        raise OptionError(f"criterion ({criterion}) must be one of {', '.join(MEASURED)}")
    if criterion == "naee-greedy":
        return _steps(stats, layer, half)
    if criterion == "loo-mse" and not stats.record.loo_tokens:
        raise OptionError("these statistics are not of masked experts", hint=_MASK)
    formula = CRITERIA[criterion]
    if domain is not None or (criterion != "easy-ep" and not weights):
        return formula(stats.sums(layer, domain, half))
    factor = {d: (weights or {}).get(d, 1.0) for d in stats.domains}
    each = {d: stats.sums(layer, d, half) for d in stats.domains}
    if criterion == "easy-ep":
        worths = {d: formula(sums) for d, sums in each.items()}
        shares = [factor[d] * w / w.sum().clamp(min=1e-300) for d, w in worths.items()]
        return torch.stack(shares).sum(0)
    first = next(iter(each.values()))
    return formula({m: torch.stack([factor[d] * each[d][m] for d in each]).sum(0) for m in first})


def _steps(stats: ExpertStats, layer: int, half: int | None) -> Tensor:
    """In which step of `naee-greedy` each expert goes, `[E]`; those that stay in the last."""
    found = stats.layers[layer].greedy_3E
    if found is None:
        raise OptionError(
            "these statistics are not of experts masked one after the other",
            hint=f"{_MASK} It takes at most {GREEDY_EXPERTS} experts a layer.",
        )
    return found[0 if half is None else 1 + half]


def convergence(
    stats: ExpertStats, layer: int, ratio: float = 0.5, criterion: str = "reap"
) -> Convergence:
    """Compare what the two halves of the data say of a layer.

    Args:
        stats: the statistics.
        layer: which layer.
        ratio: of the experts that would be kept.
        criterion: that they are ranked by.

    Raises:
        OptionError: the ratio is not between 0 and 1.
    """
    if not 0 < ratio <= 1:
        raise OptionError(f"ratio ({ratio}) must be above 0 and at most 1")
    first, second = (worth(stats, layer, criterion, half=half) for half in (0, 1))
    kept = max(1, round(ratio * len(first)))
    a, b = (set(top_indices(w, kept).tolist()) for w in (first, second))
    return Convergence(len(a & b) / len(a | b), kendall_tau(first, second))


def kendall_tau(first: Tensor, second: Tensor) -> float:
    """Kendall's τ-b of two `[E]` scores: pairs in the same order minus pairs in the other, over the
    geometric mean of the pairs that are no ties. 0 where all are ties.
    """
    upper = torch.triu_indices(len(first), len(first), offset=1, device=first.device)
    signs = [torch.sign(w[upper[0]] - w[upper[1]]) for w in (first.double(), second.double())]
    untied = math.sqrt(float(signs[0].abs().sum()) * float(signs[1].abs().sum()))
    return float((signs[0] * signs[1]).sum()) / untied if untied else 0.0
