"""The transforms that blend differences to a base: task arithmetic, DARE, TIES.

In fp64, a piece at a time in a fixed order, rounded to fp32 once (fp64 stays where an input is).
Equal tensors therefore give that tensor, bit for bit. Beside inputs and output only `Ties` holds
anything as large as a tensor: one, to find where to trim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import PlanError
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.transforms import Spec, Transform

if TYPE_CHECKING:
    import torch

#: Elements that are computed at a time: copies in fp64 stay small.
PIECE = 1 << 20


@dataclass(frozen=True)
class TaskArithmetic(Transform):
    """`base + scale · Σ weights[i] · (xs[i] − base)`."""

    base: Transform
    xs: tuple[Transform, ...]
    weights: tuple[float, ...]
    scale: float

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return (self.base, *self.xs)

    @property
    def spec(self) -> Spec:
        return blended(self)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        out = empty(values)
        if out.is_meta:
            return out
        base, *models = (v.reshape(-1) for v in values)
        combine = self._combine(base, models)

        def piece(at: int) -> torch.Tensor:
            start = widened(base, at)
            return start + combine([widened(m, at) - start for m in models]) * self.scale

        return fill(out, piece)

    def _combine(
        self, base: torch.Tensor, models: Sequence[torch.Tensor]
    ) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        """What makes one difference out of the models', piece after piece, in order."""
        return self._sum

    def _sum(self, differences: list[torch.Tensor]) -> torch.Tensor:
        parts = [d * w for d, w in zip(differences, self.weights, strict=True)]
        return sum(parts[1:], start=parts[0])

    def __str__(self) -> str:
        shown = " + ".join(f"{w:.3g}·{x}" for w, x in zip(self.weights, self.xs[:4], strict=False))
        rest = f" + … {len(self.xs)} in all" if len(self.xs) > 4 else ""
        return f"{type(self).__name__.lower()}({shown}{rest}; from {self.base} × {self.scale:g})"


@dataclass(frozen=True)
class Dare(TaskArithmetic):
    """Task arithmetic of differences whose entries are dropped with probability `1 − density`, and
    else divided by `density` (drop and rescale: the expectation stays).

    Source: arXiv 2311.03099, section 3.
    """

    density: float
    draw: Draw

    def _combine(
        self, base: torch.Tensor, models: Sequence[torch.Tensor]
    ) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        import numpy as np
        import torch

        seed, name = self.draw.seed, self.draw.name
        streams = [Draw(seed, f"{name}, model {i}").generator() for i in range(len(models))]

        def combined(differences: list[torch.Tensor]) -> torch.Tensor:
            for d, rng in zip(differences, streams, strict=True):
                kept = rng.random(len(d), dtype=np.float32) < self.density
                d.mul_(torch.from_numpy(kept)).div_(self.density)
            return self._sum(differences)

        return combined


@dataclass(frozen=True)
class Ties(TaskArithmetic):
    """`base + scale` times the mean of those differences that agree in sign, entry by entry.

    Trim: of each difference the largest `⌊density · n⌋` entries by magnitude stay, at least one;
    of equal ones the first. Elect: the sign of `Σ weights[i] · d_i`; where it is 0, nothing moves.
    Merge: the weighted mean over the models whose trimmed entry has that sign.

    Source: arXiv 2306.01708, section 4.
    """

    density: float

    def _combine(
        self, base: torch.Tensor, models: Sequence[torch.Tensor]
    ) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        trims = [_Trim(base, m, self.density) for m in models]

        def combined(differences: list[torch.Tensor]) -> torch.Tensor:
            for trim, d in zip(trims, differences, strict=True):
                trim(d)
            sign = self._sum(differences).sign_()
            total, mass = sign * 0, sign * 0
            for d, w in zip(differences, self.weights, strict=True):
                agrees = (d.sign() == sign) & (sign != 0)
                total += d * agrees * w
                mass += agrees * w
            return total / mass.masked_fill_(mass == 0, 1)

        return combined


class _Trim:
    """Sets all but the largest entries of a difference to 0, piece after piece, in order."""

    def __init__(self, base: torch.Tensor, model: torch.Tensor, density: float) -> None:
        import numpy as np
        import torch

        count = len(base)
        keep = max(1, math.floor(density * count))
        self._floor, self._ties = -1.0, 0
        self._dtype = empty((base[:0], model[:0])).dtype
        if keep >= count:
            return
        sizes = torch.empty(count, dtype=self._dtype)
        fill(sizes, lambda at: (widened(model, at) - widened(base, at)).abs_())
        found = sizes.numpy()
        found.partition(count - keep)
        self._floor = float(found[count - keep])
        self._ties = keep - int(np.count_nonzero(found > found[count - keep]))

    def __call__(self, difference: torch.Tensor) -> None:
        if self._floor < 0:
            return
        size = difference.abs().to(self._dtype)
        equal = size == self._floor
        first = equal & (equal.cumsum(0) <= self._ties)
        self._ties -= int(first.sum())
        difference.mul_((size > self._floor) | first)


def widened(flat: torch.Tensor, at: int) -> torch.Tensor:
    """A piece in fp64."""
    return flat[at : at + PIECE].double()


def empty(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Room for a result: fp32, or fp64 where an input is."""
    import torch

    wide = any(v.dtype == torch.float64 for v in values)
    return torch.empty(
        values[0].shape, dtype=torch.float64 if wide else torch.float32, device=values[0].device
    )


def fill(out: torch.Tensor, piece: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`out` with what `piece` gives for each start, in order."""
    flat = out.view(-1)
    for at in range(0, len(flat), PIECE):
        flat[at : at + PIECE] = piece(at)
    return out


def blended(node: Transform) -> Spec:
    """What a blend of tensors gives.

    Raises:
        PlanError: they differ in shape, or have values that nothing can be computed from.
    """
    specs = [x.spec for x in node.inputs]
    if len({s.shape for s in specs}) != 1:
        shapes = ", ".join(str(list(s.shape)) for s in specs)
        raise PlanError(f"cannot blend tensors of different shapes: {shapes}")
    dtypes = {s.dtype for s in specs}
    if wrong := sorted(dtypes - set(FLOAT_DTYPES)):
        raise PlanError(f"no blend of dtype {', '.join(wrong)} ({node}): dequantise first")
    return Spec.of("F64" if "F64" in dtypes else "F32", specs[0].shape)
