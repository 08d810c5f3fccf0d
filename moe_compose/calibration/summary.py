"""Statistics in a few numbers a layer, as screens and plots show them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from moe_compose.calibration.criteria import convergence
from moe_compose.calibration.stats import ExpertStats


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer in a few numbers.

    Attributes:
        layer: which.
        experts: how many.
        busiest: load of the busiest expert, in units of an even load.
        dead: experts that no token was sent to.
        entropy: of the router's distribution, mean over tokens, as a part of ln E; None where the
            router could not be read.
        mean_entropy: of its mean distribution, as a part of ln E.
        agreement: chosen experts that are among the top-k of the logits; below 1 where a correction
            bias or groups decide otherwise.
        jaccard: agreement of two halves of the data on the half of the experts to keep.
        tau: Kendall's τ of the two halves' rankings.
        apart: domain → how far its load is from the mean of the domains': half the sum of absolute
            differences, 0 to 1.
    """

    layer: int
    experts: int
    busiest: float
    dead: tuple[int, ...]
    entropy: float | None
    mean_entropy: float | None
    agreement: float | None
    jaccard: float
    tau: float
    apart: dict[str, float]


def summarise(stats: ExpertStats, layer: int, ratio: float = 0.5) -> LayerSummary:
    """One layer's summary.

    Args:
        stats: the statistics.
        layer: which layer.
        ratio: of the experts that would be kept, for `jaccard`.
    """
    import torch

    experts = stats.experts(layer)
    most = max(math.log(experts), 1e-9)
    entropy = stats.entropy(layer)
    halves = convergence(stats, layer, ratio)
    shares = torch.stack([stats.load_share(layer, d) for d in stats.domains])
    apart = (shares - shares.mean(0)).abs().sum(-1) / 2
    return LayerSummary(
        layer=layer,
        experts=experts,
        busiest=float(stats.load_share(layer).max()) * experts,
        dead=stats.dead(layer),
        entropy=None if entropy is None else entropy[0] / most,
        mean_entropy=None if entropy is None else entropy[1] / most,
        agreement=stats.agreement(layer),
        jaccard=halves.jaccard,
        tau=halves.tau,
        apart=dict(zip(stats.domains, apart.tolist(), strict=True)),
    )


def to_json(stats: ExpertStats) -> dict[str, Any]:
    """Record, and every layer's summary and load, as plain values."""
    return {
        **stats.record.to_json(),
        "layers": [
            asdict(summarise(stats, layer)) | {"load": stats.sums(layer)["count"].tolist()}
            for layer in stats.layers
        ],
    }
