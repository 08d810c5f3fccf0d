"""The transforms that compute: scale, cast, constants, draws, noise, redraw.

Arithmetic is done in fp32 (fp64 for fp64 inputs) and its output *is* fp32: a single `Cast` at the
end rounds once. Reductions are summed by numpy in fp64, on one thread, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from moe_compose.checkpoint.source import FLOAT_DTYPES, torch_dtype
from moe_compose.errors import PlanError
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.indices import Indices
from moe_compose.surgery.transforms import Read, Spec, Transform, Unary

if TYPE_CHECKING:
    import torch

#: Rows of a matrix that are taken at a time: copies in fp64 stay small.
_ROWS = 64


@dataclass(frozen=True)
class Scale(Unary):
    """`x · factor`."""

    factor: float
    elementwise: ClassVar[bool] = True

    @property
    def spec(self) -> Spec:
        return _arithmetic(self.x)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        return _widen(values[0]) * self.factor

    def __str__(self) -> str:
        return f"{self.x} × {self.factor:.6g}"


@dataclass(frozen=True)
class Cast(Unary):
    """Rounded to another dtype, to nearest even."""

    dtype: str
    elementwise: ClassVar[bool] = True
    keeps_constants: ClassVar[bool] = True

    @property
    def spec(self) -> Spec:
        s = self.x.spec
        if s.dtype not in FLOAT_DTYPES or self.dtype not in FLOAT_DTYPES:
            raise PlanError(f"cannot convert values from {s.dtype} to {self.dtype} ({self.x})")
        return Spec.of(self.dtype, s.shape)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].to(torch_dtype(self.dtype))

    def __str__(self) -> str:
        return f"{self.x} as {self.dtype}"


@dataclass(frozen=True)
class Full(Transform):
    """A constant tensor."""

    shape: tuple[int, ...]
    value: float
    dtype: str

    @property
    def spec(self) -> Spec:
        return Spec.of(self.dtype, self.shape)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.full(self.shape, self.value, dtype=torch_dtype(self.dtype))

    def __str__(self) -> str:
        return f"constant {self.value:g}"


@dataclass(frozen=True)
class Random(Transform):
    """Independent draws of mean 0 and standard deviation `std`, in fp32: `normal`, or `uniform` on
    ±std·√3.
    """

    shape: tuple[int, ...]
    std: float
    draw: Draw
    law: Literal["normal", "uniform"] = "normal"

    @property
    def spec(self) -> Spec:
        return Spec.of("F32", self.shape)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import numpy as np
        import torch

        rng = self.draw.generator()
        if self.law == "normal":
            drawn = rng.standard_normal(self.shape, dtype=np.float32)
        else:
            drawn = (rng.random(self.shape, dtype=np.float32) * 2 - 1) * np.float32(math.sqrt(3))
        return torch.from_numpy(drawn).mul_(self.std)

    def __str__(self) -> str:
        return f"{self.law}(0, {self.std:g}²), seed {self.draw.seed}"


@dataclass(frozen=True)
class Noise(Unary):
    """`N(0, (std·std(x))²)` added at the positions `at` of `dim` of a matrix."""

    at: Indices
    dim: int
    std: float
    draw: Draw

    @property
    def spec(self) -> Spec:
        return _arithmetic(self.x)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        x = _widen(values[0])
        if x.is_meta:
            return x
        _, sigma = _moments(x[i : i + _ROWS] for i in range(0, len(x), _ROWS))
        normal = _Normal(self.draw, 0.0, self.std * sigma)
        for view, index, dim in _block(x, self.at, self.dim):
            view.index_copy_(dim, index, (part := view.index_select(dim, index)) + normal(part))
        return x

    def __str__(self) -> str:
        return f"{self.x} + {self.std:g}·σ noise on {self.at}"


@dataclass(frozen=True)
class Redraw(Unary):
    """The block at positions `at` of `dim` of a matrix replaced by `N(μ, σ²)` with the block's own
    mean and standard deviation.

    Source: Drop-Upcycling (arXiv 2502.19261), section 3.
    """

    at: Indices
    dim: int
    draw: Draw

    @property
    def spec(self) -> Spec:
        return _arithmetic(self.x)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        x = _widen(values[0])
        if x.is_meta or not len(self.at):
            return x
        parts = (v.index_select(d, index) for v, index, d in _block(x, self.at, self.dim))
        normal = _Normal(self.draw, *_moments(parts))
        for view, index, dim in _block(x, self.at, self.dim):
            view.index_copy_(dim, index, normal(view.index_select(dim, index)))
        return x

    def __str__(self) -> str:
        return f"{self.x} with {self.at} redrawn"


def constant_value(
    x: Transform, of_source: Callable[[Read], Hashable | None] = lambda read: None
) -> Hashable | None:
    """The one value that a transform's output has throughout; None when it has several.

    Args:
        x: the transform.
        of_source: the same of a source's tensor: a number, or whatever stands for one.
    """
    if isinstance(x, Full):
        return x.value
    if isinstance(x, Read):
        return of_source(x)
    if not x.keeps_constants:
        return None
    values = {constant_value(part, of_source) for part in x.inputs}
    return values.pop() if len(values) == 1 else None


def cast(x: Transform, dtype: str) -> Transform:
    """`x` as `dtype`; `x` itself when it already is. Casts of casts of constants and draws collapse
    to one rounding.
    """
    if isinstance(x, Full):
        return replace(x, dtype=dtype)
    return x if x.spec.dtype == dtype else Cast(x, dtype)


def _arithmetic(x: Transform) -> Spec:
    s = x.spec
    if s.dtype not in FLOAT_DTYPES:
        raise PlanError(f"no arithmetic on dtype {s.dtype} ({x}): dequantise the checkpoint first")
    return Spec.of("F64" if s.dtype == "F64" else "F32", s.shape)


def _widen(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _block(
    x: torch.Tensor, at: Indices, dim: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """The block `at` of a matrix as (view, indices, dimension), in row-major order, a few rows at a
    time, so that changing it takes no second matrix.
    """
    import torch

    index = torch.from_numpy(at.indices())
    if dim == 0:
        for start in range(0, len(index), _ROWS):
            yield x, index[start : start + _ROWS], 0
    else:
        for start in range(0, len(x), _ROWS):
            yield x[start : start + _ROWS], index, 1


def _moments(parts: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Mean and (population) standard deviation, summed by numpy in fp64: one thread, one order.

    Sums are taken of deviations from the first part's mean, so that one pass loses nothing.
    """
    import numpy as np

    sums, squares, count, shift = [], [], 0, None
    for part in parts:
        values = part.numpy().astype(np.float64)
        shift = float(values.mean()) if shift is None else shift
        values -= shift
        sums.append(float(values.sum()))
        squares.append(float(np.square(values).sum()))
        count += values.size
    if not count or shift is None:
        return 0.0, 0.0
    mean = math.fsum(sums) / count
    return shift + mean, math.sqrt(max(0.0, math.fsum(squares) / count - mean * mean))


class _Normal:
    """`N(mean, std²)` from one stream; successive calls continue it."""

    def __init__(self, draw: Draw, mean: float, std: float) -> None:
        self._generator, self._mean, self._std = draw.generator(), mean, std

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """Fresh values of the shape and dtype of `like`."""
        import numpy as np
        import torch

        drawn = self._generator.standard_normal(tuple(like.shape), dtype=np.float32)
        return torch.from_numpy(drawn).to(like.dtype).mul_(self._std).add_(self._mean)
