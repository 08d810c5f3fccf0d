"""What can be asked of `prune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from moe_compose.surgery.expert_options import MtpPolicy

if TYPE_CHECKING:
    from moe_compose.architectures import MoE

Criterion = Literal[
    "reap", "frequency", "gate-sum", "ean-sum", "ean-mean", "ean-mean-sq", "weighted-ean",
    "easy-ep", "loo-mse", "naee-greedy", "aimer", "random", "given",
]  # fmt: skip

#: Criterion → what it keeps, and the paper.
CRITERIA: Mapping[str, tuple[str, str]] = {
    "reap": ("the largest mean of weight times output norm", "REAP, arXiv 2510.13999"),
    "frequency": ("the most often chosen", "baseline"),
    "gate-sum": ("the largest sum of weights", "SEER-MoE, arXiv 2404.05089"),
    "ean-sum": ("the largest sum of output norms", "arXiv 2504.05586"),
    "ean-mean": ("the largest mean output norm", "arXiv 2504.05586"),
    "ean-mean-sq": ("the largest mean squared output norm", "arXiv 2606.15716"),
    "weighted-ean": ("the largest sum of weight times output norm", "arXiv 2504.06792"),
    "easy-ep": (
        "the largest sum of weight times output norm, tokens that the layer turns first",
        "EASY-EP, arXiv 2504.06792",
    ),
    "loo-mse": (
        "those without which the layer's output changes most, each alone",
        "NVIDIA Model-Optimizer",
    ),
    "naee-greedy": (
        "those left when the one that the layer's output misses least goes, again and again",
        "NAEE, arXiv 2402.14800",
    ),
    "aimer": (
        "the smallest mean size of weights over their root mean square; no text",
        "AIMER, arXiv 2603.18492",
    ),
    "random": ("whatever the seed says", "baseline"),
    "given": ("the first of a ranking that another tool made", "baseline"),
}

#: Criteria that need no statistics.
WITHOUT_STATS: tuple[Criterion, ...] = ("aimer", "random", "given")

#: Criteria whose statistics are of masked experts: `calibrate` with `loo_tokens`.
OF_MASKED: tuple[Criterion, ...] = ("loo-mse", "naee-greedy")

#: Most experts of a layer that `naee-greedy` is for.
GREEDY_EXPERTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneOptions:
    """Options of `prune`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        keep: Routed experts to keep in every layer; this, ratio or size.
        ratio: Fraction of the experts to remove, at most, between 0 and 1; this, keep or size.
        size: How large the result may be: a share of the source's bytes, such as 0.7, or bytes of
            weights, such as 20GB; as many experts stay as fit. This, keep or ratio.
        criterion: What makes an expert worth keeping: reap, frequency, gate-sum, ean-sum, ean-mean,
            ean-mean-sq, weighted-ean, easy-ep, loo-mse, naee-greedy, aimer, random, or given.
        domain_weight: How much a domain of the statistics counts, such as code=2; 1 each by
            default.
        super_experts: Keep the few experts whose outputs are enormous (arXiv 2507.23279) whatever
            they are worth, or ignore that they are.
        mtp: Experts of multi-token-prediction layers: prune them by the ids of the last layer, drop
            these layers, or keep (refused if the number changes).
        seed: Seed of criterion random.
        ranking: JSON file for criterion given, {"layer": [experts, best first]}.
    """

    keep: int | None = None
    ratio: float | None = None
    size: str | None = None
    criterion: Criterion = "reap"
    domain_weight: tuple[str, ...] = ()
    super_experts: Literal["keep", "ignore"] = "keep"
    mtp: MtpPolicy = "prune"
    seed: int = 0
    ranking: Path | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Domain → weight, as `domain_weight` says; entries that say nothing left out."""
        found = {}
        for entry in self.domain_weight:
            name, _, number = entry.rpartition("=")
            weight = _number(number)
            if name and weight is not None:
                found[name] = weight
        return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def kept_count(options: PruneOptions, moe: MoE) -> int:
    """How many experts are kept; with `ratio`, the fewest that still divide into the groups."""
    if options.keep is not None:
        return options.keep
    groups = moe.routing.groups if moe.routing.grouped else 1
    removed = int((options.ratio or 0.0) * moe.num_experts + 1e-9)
    return moe.num_experts - removed // groups * groups


def allowed_counts(options: PruneOptions, moe: MoE) -> list[int]:
    """Counts of experts that the router can do with, ascending; the whole number included."""
    how = replace(options, ratio=None, size=None)
    counts = range(1, moe.num_experts + 1)
    return [c for c in counts if not list(option_problems(replace(how, keep=c), moe))]


def option_problems(options: PruneOptions, moe: MoE) -> Iterator[str]:
    """Options, or combinations, that cannot be meant for an MoE."""
    given = [n for n in ("keep", "ratio", "size") if getattr(options, n) is not None]
    if len(given) != 1:
        said = " and ".join(given) or "none"
        yield f"one of keep, ratio and size says how many experts stay ({said} given)"
    if options.criterion not in CRITERIA:
        yield f"criterion ({options.criterion}) must be one of {', '.join(CRITERIA)}"
    if options.super_experts not in ("keep", "ignore"):
        yield f"super_experts ({options.super_experts}) must be keep or ignore"
    if options.mtp not in get_args(MtpPolicy):
        yield f"mtp ({options.mtp}) must be one of {', '.join(get_args(MtpPolicy))}"
    if options.ranking is not None and options.criterion != "given":
        yield f"a ranking has no meaning for criterion {options.criterion}; use given"
    if options.domain_weight and options.criterion in WITHOUT_STATS:
        yield f"domain_weight has no meaning for criterion {options.criterion}: it sees no text"
    if options.criterion == "naee-greedy":
        if options.domain_weight:
            yield "domain_weight has no meaning for criterion naee-greedy: its order is of all text"
        if moe.num_experts > GREEDY_EXPERTS:
            yield (
                f"criterion naee-greedy is for at most {GREEDY_EXPERTS} experts a layer "
                f"({moe.num_experts}): use loo-mse"
            )
    for entry in options.domain_weight:
        name, _, number = entry.rpartition("=")
        if not name or _number(number) is None:
            yield f"domain_weight ({entry}) must be NAME=NUMBER, the number 0 or more"
    yield from _count_problems(options, moe)


def _count_problems(options: PruneOptions, moe: MoE) -> Iterator[str]:
    from moe_compose.surgery.selection import group_problem
    from moe_compose.surgery.sizing import size_problem

    if options.size is not None and (problem := size_problem(options.size)):
        yield problem
    if options.ratio is not None and not 0 <= options.ratio < 1:
        yield f"ratio ({options.ratio}) must be at least 0 and below 1"
        return
    if options.keep is None and options.ratio is None:
        return
    count = kept_count(options, moe)
    if not 1 <= count <= moe.num_experts:
        yield f"keep ({count}) must be between 1 and the number of experts ({moe.num_experts})"
    elif count < moe.top_k:
        yield (
            f"cannot prune to {count} experts: the router picks top_k = {moe.top_k} experts per "
            f"token; keep at least {moe.top_k}"
        )
    elif moe.routing.grouped:
        groups, each = moe.routing.groups, count // moe.routing.groups
        size = moe.num_experts // groups
        ids = [g * size + e for g in range(groups) for e in range(each)]
        if count % groups:
            yield f"keep ({count}) must be a multiple of the router's groups ({groups})"
        elif problem := group_problem(moe, ids):
            yield f"cannot prune to {count} experts: {problem}"
