"""Which experts of a layer become one (METHODS section 6), from what was measured.

    hc-smoe   2410.08589   average linkage of the Euclidean distances of mean outputs
    m-smoe    2310.01334   the most frequent experts, and to each those with like router logits
    ream      2604.04356   the most salient experts, and to each, in turn, those most like it

Every layer gets as many groups. Where a router chooses among groups of experts first, each of these
is grouped by itself, into as many. Ties go to the lower index.

What differs from the papers: M-SMoE takes more groups in some layers than in others, which no
engine serves, and HC-SMoE averages outputs over all tokens, here it is the sample that
`calibrate --similarity` took.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_compose.architectures import MoE
from moe_compose.calibration.criteria import worth
from moe_compose.calibration.similarity import Similarity
from moe_compose.calibration.stats import ExpertStats
from moe_compose.errors import CheckpointError, OptionError, UnsupportedError
from moe_compose.surgery.groups import ExpertGroups, Grouping
from moe_compose.surgery.merge_options import MergeOptions

#: Groups as lists of experts, the representative first.
Groups = list[list[int]]


def needs(module: str) -> Any:
    """A module of scipy, which merging alone needs.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        return import_module(module)
    except ImportError as e:
        raise UnsupportedError(
            "merging experts needs scipy", hint="pip install 'moe-compose[merge]'"
        ) from e


def hc_smoe(mean_ED: Tensor, count_E: Tensor, groups: int) -> Groups:
    """Hierarchical clustering by mean output; a cluster's representative is its most frequent
    expert (2410.08589).

    Args:
        mean_ED: mean output of each expert over the same tokens.
        count_E: how often each was chosen.
        groups: how many to cut the tree into.
    """
    experts = len(mean_ED)
    clusters: dict[int, list[int]] = {e: [e] for e in range(experts)}
    if groups < experts:
        linkage = needs("scipy.cluster.hierarchy").linkage
        tree = linkage(mean_ED.double().numpy(), method="average", metric="euclidean")
        for step, (a, b, _, _) in enumerate(tree[: experts - groups]):
            clusters[experts + step] = clusters.pop(int(a)) + clusters.pop(int(b))
    return [sorted(c, key=lambda e: (-float(count_E[e]), e)) for c in clusters.values()]


def m_smoe(gate_EE: Tensor, count_E: Tensor, groups: int) -> Groups:
    """The most frequent experts, each joined by those whose router logits are most like its own
    (2310.01334).

    Args:
        gate_EE: cosine of the experts' router logits.
        count_E: how often each was chosen.
        groups: how many experts dominate one.
    """
    dominant = best_first(count_E)[:groups]
    found = {e: [e] for e in dominant}
    for e in range(len(count_E)):
        if e not in found:
            found[min(dominant, key=lambda d: (-float(gate_EE[e, d]), d))].append(e)
    return list(found.values())


def ream(alike_EE: Tensor, worth_E: Tensor, groups: int, size: int) -> Groups:
    """The most salient experts, which in this order take the unassigned ones most like them
    (2604.04356): the first groups are full, most of the others stay alone.

    Args:
        alike_EE: similarity of the experts.
        worth_E: saliency: REAP's worth.
        groups: how many experts are centroids.
        size: most experts of a group.
    """
    centroids = best_first(worth_E)[:groups]
    left, found = set(range(len(worth_E))) - set(centroids), []
    for c in centroids:
        nearest = sorted(left, key=lambda e, c=c: (-float(alike_EE[c, e]), e))[: size - 1]  # type: ignore[misc]
        left -= set(nearest)
        found.append([c, *nearest])
    if left:
        raise OptionError(
            f"{groups} groups of at most {size} cannot hold {len(worth_E)} experts",
            hint="Keep more experts, or raise group_size.",
        )
    return found


def similarity_of(found: Similarity) -> Tensor:
    """REAM's: the mean of two cosines, each mapped to 0 to 1: of router logits over the tokens,
    and of outputs, mean over the tokens, `[E, E]`.

    Outputs are compared without the router's weights, which are positive and leave a cosine as it
    is.
    """
    gate_EE = found.gate_EE
    assert gate_EE is not None
    experts = len(found.cosine_EE)  # rows of no FFN may follow in the router
    gate_EE = gate_EE[:experts, :experts]
    return ((gate_EE.double() + 1) / 2 + (found.cosine_EE.double() + 1) / 2) / 2


def best_first(worth_E: Tensor) -> list[int]:
    """Experts by worth; ties go to the lower index."""
    return sorted(range(len(worth_E)), key=lambda e: (-float(worth_E[e]), e))


def group_experts(stats: ExpertStats, options: MergeOptions, moe: MoE) -> Grouping:
    """Group the experts of all layers. Reads statistics, and no weights.

    Args:
        stats: the statistics, with similarities.
        options: of the merging.
        moe: what the config says of the experts.

    Raises:
        OptionError: the statistics hold no similarities.
        CheckpointError: a layer's similarities are missing, damaged, or not numbers.
        UnsupportedError: the router could not be read and the method compares its logits; or scipy
            is not installed.
    """
    layers = {i: _layer(stats, i, options, moe) for i in sorted(stats.layers)}
    record = stats.record
    of = {
        "stats_of": record.source,
        "text": record.text,
        "tokens": {d: stats.tokens(d) for d in stats.domains},
        "sample": record.sample,
    }
    idle = sum(len(stats.dead(i)) for i in stats.layers)
    note = f"{idle} experts were never chosen on {stats.tokens():,} tokens: their weight is 0"
    return Grouping(method=options.method, layers=layers, of=of, notes=(note,) if idle else ())


def _layer(stats: ExpertStats, layer: int, options: MergeOptions, moe: MoE) -> ExpertGroups:
    """Groups of one layer, within the router's own groups."""
    assert options.keep is not None
    found = stats.similarity(layer)
    count_E = stats.sums(layer)["count"]
    worth_E = worth(stats, layer, "reap") if options.method == "ream" else count_E
    table = _table(found, options, layer)
    if not bool(torch.isfinite(table).all()):
        raise CheckpointError(f"{found.path.name} holds values that are no numbers")
    routers = moe.routing.groups if moe.routing.grouped else 1
    size, each = moe.num_experts // routers, options.keep // routers
    method: Callable[[Tensor, Tensor, int], Groups] = {
        "hc-smoe": hc_smoe,
        "m-smoe": m_smoe,
        "ream": lambda table, worth, n: ream(table, worth, n, options.group_size),
    }[options.method]
    groups: list[Sequence[int]] = []
    for first in range(0, moe.num_experts, size):
        at = slice(first, first + size)
        part = table[at] if options.method == "hc-smoe" else table[at, at]
        groups += ([first + e for e in g] for g in method(part, worth_E[at], each))
    return ExpertGroups.of(groups, worth_E.tolist())


def _table(found: Similarity, options: MergeOptions, layer: int) -> Tensor:
    """What the method compares experts by."""
    if options.method == "hc-smoe":
        return found.mean_ED
    if found.gate_EE is None:
        raise UnsupportedError(
            f"method {options.method} compares router logits, and the router of layer {layer} "
            "could not be read",
            hint="Use --method hc-smoe, which compares outputs only.",
        )
    return found.gate_EE if options.method == "m-smoe" else similarity_of(found)
