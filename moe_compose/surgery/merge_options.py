"""What can be asked of `merge`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from moe_compose.surgery.expert_options import MtpPolicy

if TYPE_CHECKING:
    from moe_compose.architectures import MoE

MergeMethod = Literal["hc-smoe", "m-smoe", "ream"]
RouterRow = Literal["representative", "mean"]
Align = Literal["method", "weights", "activations", "none"]

#: Method → what it does, and the paper.
MERGE_METHODS: Mapping[str, tuple[str, str]] = {
    "hc-smoe": (
        "clusters of like mean outputs, averaged by frequency",
        "HC-SMoE, arXiv 2410.08589",
    ),
    "m-smoe": (
        "each expert joins the frequent one whose router logits are most like its own, averaged "
        "by frequency",
        "M-SMoE, arXiv 2310.01334",
    ),
    "ream": (
        "each of the most salient experts takes those most like it, averaged by saliency",
        "REAM, arXiv 2604.04356",
    ),
}

#: Method → what neurons are compared by unless something else is asked for.
ALIGNED_BY: Mapping[str, Align] = {
    "hc-smoe": "weights", "m-smoe": "weights", "ream": "activations",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """Options of `merge`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        keep: Routed experts that every layer is left with; this or size.
        size: How large the result may be: a share of the source's bytes, such as 0.7, or bytes of
            weights, such as 20GB; as many experts are left as fit. This or keep.
        method: How experts are grouped and weighted: hc-smoe, m-smoe, or ream.
        router: Router row of a group: that of its representative (hc-smoe and m-smoe the most
            frequent, ream the most salient expert), or, with hc-smoe, the weighted mean of all.
        align: Permute neurons to those of the representative before averaging, by their weights, or
            by their activations and weights (needs disk and time, and is what ream does), or none;
            method: activations for ream, weights for the others.
        group_size: Most experts in one group (ream).
        mtp: Experts of multi-token-prediction layers: prune them to the representatives of the last
            layer, unmerged, drop these layers, or keep (refused if the number changes).
    """

    keep: int | None = None
    size: str | None = None
    method: MergeMethod = "ream"
    router: RouterRow = "representative"
    align: Align = "method"
    group_size: int = 16
    mtp: MtpPolicy = "prune"

    @property
    def aligned_by(self) -> Align:
        """What neurons are compared by."""
        return ALIGNED_BY[self.method] if self.align == "method" else self.align


def allowed_counts(options: MergeOptions, moe: MoE) -> list[int]:
    """Counts of experts that router and method can do with, ascending; the whole one included."""
    how = replace(options, size=None)
    counts = range(1, moe.num_experts + 1)
    return [c for c in counts if not list(merge_option_problems(replace(how, keep=c), moe))]


def merge_option_problems(options: MergeOptions, moe: MoE) -> Iterator[str]:
    """Options, or combinations, that cannot be meant for an MoE."""
    for name, choices in (
        ("method", MergeMethod), ("router", RouterRow), ("align", Align), ("mtp", MtpPolicy),
    ):  # fmt: skip
        value = getattr(options, name)
        if value not in get_args(choices):
            yield f"{name} ({value}) must be one of {', '.join(get_args(choices))}"
    if options.router == "mean" and options.method != "hc-smoe":
        yield f"router = mean is hc-smoe's; method {options.method} keeps the row of one expert"
    if options.group_size < 2:
        yield f"group_size ({options.group_size}) must be at least 2"
    yield from _count_problems(options, moe)


def _count_problems(options: MergeOptions, moe: MoE) -> Iterator[str]:
    from moe_compose.surgery.selection import group_problem
    from moe_compose.surgery.sizing import size_problem

    count, groups = options.keep, moe.routing.groups if moe.routing.grouped else 1
    if options.size is not None and (problem := size_problem(options.size)):
        yield problem
    if (count is None) == (options.size is None):
        given = "neither" if count is None else "both"
        yield f"one of keep and size says how many experts are left ({given} given)"
    elif count is None:
        return
    elif not 1 <= count <= moe.num_experts:
        yield f"keep ({count}) must be between 1 and the number of experts ({moe.num_experts})"
    elif count < moe.top_k:
        yield (
            f"cannot merge to {count} experts: the router picks top_k = {moe.top_k} experts per "
            f"token; keep at least {moe.top_k}"
        )
    elif count % groups:
        yield f"keep ({count}) must be a multiple of the router's groups ({groups})"
    else:
        size, each = moe.num_experts // groups, count // groups
        ids = [g * size + e for g in range(groups) for e in range(each)]
        if problem := group_problem(moe, ids):
            yield f"cannot merge to {count} experts: {problem}"
        if options.method == "ream" and size > each * options.group_size:
            yield (
                f"{each} groups of at most {options.group_size} cannot hold {size} experts; keep "
                "more, or raise group_size"
            )
