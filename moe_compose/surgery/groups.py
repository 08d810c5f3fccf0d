"""`ExpertGroups` and `Grouping`: which experts become one, with which weights, and how their
neurons correspond.

Surgery is told, it does not measure: calibration makes groupings from statistics and weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_compose.surgery.indices import Order

#: How far weights of a group may be from summing to 1.
SUM_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """A partition of one layer's experts, with weights.

    Attributes:
        members: groups in the order of the result's experts; in each its representative first, the
            others ascending.
        weights: of each member in its group's mean; they sum to 1.

    Example:
        >>> groups = ExpertGroups.of([[2, 0], [1]], [1.0, 5.0, 3.0])
        >>> groups.members, groups.weights
        (((1,), (2, 0)), ((1.0,), (0.75, 0.25)))
        >>> groups.labels
        (1, 0, 1)
    """

    members: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, groups: Iterable[Sequence[int]], worth: Sequence[float]) -> ExpertGroups:
        """Groups in the order of their representatives, weighted by worth.

        Args:
            groups: experts, the representative of each group first.
            worth: of every expert, 0 or more; a group that is worth nothing is averaged evenly.
        """
        members = tuple(sorted((g[0], *sorted(g[1:])) for g in groups))
        return cls(members, tuple(_shares([worth[e] for e in g]) for g in members))

    @property
    def representatives(self) -> tuple[int, ...]:
        """The expert of each group whose router row and neuron order the result has."""
        return tuple(g[0] for g in self.members)

    @property
    def labels(self) -> tuple[int, ...]:
        """Expert → its group."""
        homes = {e: j for j, group in enumerate(self.members) for e in group}
        return tuple(homes[e] for e in sorted(homes))

    @property
    def trivial(self) -> bool:
        """Whether every expert stays alone."""
        return all(len(g) == 1 for g in self.members)

    def problems(self, experts: int) -> Iterator[str]:
        """Why it is no partition of so many experts, or has no such weights; in words."""
        listed = sorted(e for g in self.members for e in g)
        if listed != list(range(experts)) or not all(self.members):
            yield f"experts 0 to {experts - 1} must be in one group each ({listed})"
        if [len(w) for w in self.weights] != [len(g) for g in self.members]:
            yield "every member of a group must have a weight"
            return
        for group, weights in zip(self.members, self.weights, strict=True):
            total = math.fsum(weights)
            if not abs(total - 1) <= SUM_TOLERANCE or min(weights) < 0:
                yield f"weights of group {list(group)} must be 0 or more and sum to 1 ({total:g})"


def _shares(worth: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(worth)
    if not total > 0:
        return (1 / len(worth),) * len(worth)
    return tuple(w / total for w in worth)


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Groups of every sparse layer.

    Attributes:
        method: what they were made by.
        layers: sparse layer → its groups.
        orders: layer → expert → its neurons in the order of its representative's; experts that are
            not there keep their own.
        aligned: what neurons were compared by; empty if they were not.
        of: what it was made from, as plain values, for the record.
        notes: what a user should know of it before merging by it.
    """

    method: str
    layers: Mapping[int, ExpertGroups]
    orders: Mapping[int, Mapping[int, Order]] = field(default_factory=dict)
    aligned: str = ""
    of: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def problems(self, experts: int, layers: Sequence[int]) -> Iterator[str]:
        """Why it is no grouping of these layers, in words."""
        if set(self.layers) != set(layers):
            yield f"layers {sorted(self.layers)} are grouped, {sorted(layers)} have experts"
        counts = {len(g.members) for g in self.layers.values()}
        if len(counts) > 1:
            yield f"every layer must have as many groups ({sorted(counts)})"
        for layer, groups in self.layers.items():
            yield from (f"layer {layer}: {problem}" for problem in groups.problems(experts))
        for layer, orders in self.orders.items():
            wrong = [e for e, order in orders.items() if not order.is_permutation]
            if wrong:
                yield f"layer {layer}: the neuron orders of experts {wrong} are no permutations"
