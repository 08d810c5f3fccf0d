"""The transforms that average: whole tensors, and rows of one.

Sums are taken in fp64, in a fixed order, and rounded to fp32 once; so a mean of equal values is
that value, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import PlanError
from moe_compose.surgery.groups import SUM_TOLERANCE
from moe_compose.surgery.transforms import Spec, Transform, Unary

if TYPE_CHECKING:
    import torch

#: Elements that are summed at a time: copies in fp64 stay in the processor's cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Mean(Transform):
    """`Σ weights[i] · xs[i]`, of tensors of one shape; the weights sum to 1."""

    xs: tuple[Transform, ...]
    weights: tuple[float, ...]
    elementwise: ClassVar[bool] = True
    keeps_constants: ClassVar[bool] = True

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return self.xs

    @property
    def spec(self) -> Spec:
        _check(self.weights, len(self.xs))
        specs = [x.spec for x in self.xs]
        if len({s.shape for s in specs}) != 1:
            shapes = ", ".join(str(list(s.shape)) for s in specs)
            raise PlanError(f"cannot average tensors of different shapes: {shapes}")
        return _float(specs, self)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        wide = any(v.dtype == torch.float64 for v in values)
        out = torch.empty_like(
            values[0], dtype=torch.float64 if wide else torch.float32
        ).contiguous()
        if out.is_meta:
            return out
        flat, parts = out.view(-1), [v.reshape(-1) for v in values]
        for at in range(0, len(flat), _PIECE):
            pieces = [part[at : at + _PIECE] for part in parts]
            total = _widened(pieces[0]).mul_(self.weights[0])
            for piece, weight in zip(pieces[1:], self.weights[1:], strict=True):
                total += _widened(piece).mul_(weight)
            flat[at : at + _PIECE] = total
        return out

    def __str__(self) -> str:
        shown = " + ".join(f"{w:.3g}·{x}" for x, w in zip(self.xs[:4], self.weights, strict=False))
        return shown + (f" + … {len(self.xs)} in all" if len(self.xs) > 4 else "")


@dataclass(frozen=True)
class Mix(Unary):
    """Along `dim`, position j is the mean of the positions `groups[j]` under `weights[j]`."""

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    dim: int = 0
    keeps_constants: ClassVar[bool] = True

    @property
    def spec(self) -> Spec:
        for group, weights in zip(self.groups, self.weights, strict=True):
            _check(weights, len(group))
        s = _float([self.x.spec], self)
        return Spec.of(s.dtype, (*s.shape[: self.dim], len(self.groups), *s.shape[self.dim + 1 :]))

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        (x,) = values
        out = torch.float64 if x.dtype == torch.float64 else torch.float32
        means = []
        for group, weights in zip(self.groups, self.weights, strict=True):
            rows = [x.select(self.dim, e).double() * w for e, w in zip(group, weights, strict=True)]
            means.append(sum(rows[1:], start=rows[0]))
        return torch.stack(means, self.dim).to(out)

    def __str__(self) -> str:
        return f"{self.x}, {len(self.groups)} means of rows"


def _widened(piece: torch.Tensor) -> torch.Tensor:
    import torch

    return piece.to(torch.float64, copy=True)


def _check(weights: tuple[float, ...], count: int) -> None:
    total = math.fsum(weights)
    if len(weights) != count or not abs(total - 1) <= SUM_TOLERANCE:
        raise PlanError(f"weights of a mean must sum to 1 ({total:g} over {len(weights)})")


def _float(specs: list[Spec], what: Transform) -> Spec:
    dtypes = {s.dtype for s in specs}
    if wrong := sorted(dtypes - set(FLOAT_DTYPES)):
        raise PlanError(f"no mean of dtype {', '.join(wrong)} ({what}): dequantise first")
    return Spec.of("F64" if "F64" in dtypes else "F32", specs[0].shape)
