"""Tables from token ids to expert ids (hash routing, DeepSeek-V4), rewritten when experts move.

A token whose expert is gone goes to the next one that is kept, in the order of ids and round the
end, and that the token does not have already. There is no score to go by: a table is all that
chose. So neighbours take over, evenly, and every token keeps as many different experts as it had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_compose.errors import PlanError
from moe_compose.surgery.transforms import Spec, Unary

if TYPE_CHECKING:
    import torch

#: Integers that torch can index with.
_INTEGERS = ("U8", "I8", "I16", "I32", "I64")


@dataclass(frozen=True)
class Renumber(Unary):
    """A table `[V, K]` of expert ids, of those that the result has.

    Attributes:
        kept: the old ids, in the order of the new ones; of one that is there twice, the first.
        experts: how many there were.
        keep_ids: experts keep their old ids, and only those that are gone are replaced.
    """

    kept: tuple[int, ...]
    experts: int
    keep_ids: bool = False

    @property
    def spec(self) -> Spec:
        spec = self.x.spec
        if spec.dtype not in _INTEGERS or len(spec.shape) != 2:
            raise PlanError(f"{self.x} is no table of expert ids ({spec.dtype} {list(spec.shape)})")
        return spec

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        (table,) = values
        first = {e: i for i, e in reversed(list(enumerate(self.kept)))}
        old = sorted(first)
        new = [e if self.keep_ids else first[e] for e in old]
        renumbered = [-1] * self.experts
        for e, i in zip(old, new, strict=True):
            renumbered[e] = i
        after = [sum(e < gone for e in old) % len(old) for gone in range(self.experts)]

        def at(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=table.device)

        ids_VK = table.long()
        found_VK, next_VK, kept = at(renumbered)[ids_VK], at(after)[ids_VK], at(new)
        for k in range(table.shape[1]):
            next_V = next_VK[:, k]
            for _ in range(table.shape[1]):
                taken_V = (found_VK == kept[next_V % len(new)][:, None]).any(1)
                next_V = next_V + taken_V
            column_V = torch.where(found_VK[:, k] < 0, kept[next_V % len(new)], found_VK[:, k])
            found_VK = torch.cat((found_VK[:, :k], column_V[:, None], found_VK[:, k + 1 :]), 1)
        return found_VK.to(table.dtype)

    def __str__(self) -> str:
        return f"{self.x} for {len(self.kept)} of {self.experts} experts"


@dataclass(frozen=True)
class Regroup(Unary):
    """A table `[V, K]` of expert ids after experts were merged: each becomes its group.

    A token whose experts came into one group has it once, and then the next group that it does not
    have, in the order of ids and round the end, so that it keeps as many different experts.

    Attributes:
        homes: expert → its group.
    """

    homes: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        spec = self.x.spec
        if spec.dtype not in _INTEGERS or len(spec.shape) != 2:
            raise PlanError(f"{self.x} is no table of expert ids ({spec.dtype} {list(spec.shape)})")
        return spec

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        (table,) = values
        homes = torch.tensor(self.homes, dtype=torch.int64, device=table.device)
        found_VK = homes[table.long()]
        count = max(self.homes) + 1
        for k in range(1, table.shape[1]):
            for _ in range(k):
                taken_V = (found_VK[:, :k] == found_VK[:, k, None]).any(1)
                column_V = (found_VK[:, k] + taken_V) % count
                found_VK = torch.cat((found_VK[:, :k], column_V[:, None], found_VK[:, k + 1 :]), 1)
        return found_VK.to(table.dtype)

    def __str__(self) -> str:
        return f"{self.x} for {len(set(self.homes))} groups of {len(self.homes)} experts"
