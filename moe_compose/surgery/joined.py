"""FFNs whose outputs are added, as one FFN: their neurons side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe_compose.errors import PlanError
from moe_compose.surgery.ffn import FFN
from moe_compose.surgery.transforms import Concat, Spec, Transform

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Beside(Transform):
    """Matrices side by side: one after another along the second dimension."""

    xs: tuple[Transform, ...]
    keeps_constants: ClassVar[bool] = True

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return self.xs

    @property
    def spec(self) -> Spec:
        specs = [x.spec for x in self.xs]
        if len(kinds := {(s.dtype, s.shape[0], len(s.shape)) for s in specs}) != 1:
            raise PlanError(f"cannot put matrices that differ side by side: {sorted(kinds)}")
        return Spec.of(specs[0].dtype, (specs[0].shape[0], sum(s.shape[1] for s in specs)))

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat(values, 1)

    def __str__(self) -> str:
        return f"beside({', '.join(map(str, self.xs))})"


def joined(ffns: Sequence[FFN]) -> FFN:
    """One FFN that computes the sum of several; the one itself where there is no other.

    `gate, up: [Σ F_i, D]`, `down: [D, Σ F_i]`.
    """
    if len(ffns) == 1:
        return ffns[0]
    return FFN(
        Concat(tuple(f.gate for f in ffns)),
        Concat(tuple(f.up for f in ffns)),
        Beside(tuple(f.down for f in ffns)),
    )
