"""The transforms that compute: scale, cast, constants, draws, noise, redraw.

Arithmetic is done in fp32 (fp64 for fp64 inputs) and its output *is* fp32: a single `Cast` at the
end rounds once. Reductions are summed by numpy in fp64, on one thread, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from moe_compose.checkpoint.source import FLOAT_DTYPES, torch_dtype
from moe_compose.errors import PlanError
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.indices import Indices
from moe_compose.surgery.transforms import Spec, Transform, Unary

if TYPE_CHECKING:
    import torch

#: Elements that a reduction takes at a time: fp64 copies stay small.
_RUN = 1 << 20


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

    @property
    def spec(self) -> Spec:
        s = self.x.spec
        if s.dtype not in FLOAT_DTYPES or self.dtype not in FLOAT_DTYPES:
            raise PlanError(f"cannot convert values from {s.dtype} to {self.dtype}")
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
    """`N(0, (std·std(x))²)` added at the positions `at` of `dim`; the rest unchanged (random noise
    upcycling).
    """

    at: Indices
    dim: int
    std: float
    draw: Draw

    @property
    def spec(self) -> Spec:
        return _arithmetic(self.x)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        return _on_block(_widen(values[0]), self.at, self.dim, self._perturb)

    def _perturb(self, whole: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        _, sigma = _moments(whole)
        return block + _normal(self.draw, block, 0.0, self.std * sigma)

    def __str__(self) -> str:
        return f"{self.x} + {self.std:g}·σ noise on {self.at}"


@dataclass(frozen=True)
class Redraw(Unary):
    """The block at positions `at` of `dim` replaced by `N(μ, σ²)` with the block's own mean and
    standard deviation.

    Source: Drop-Upcycling (arXiv 2502.19261), section 3.
    """

    at: Indices
    dim: int
    draw: Draw

    @property
    def spec(self) -> Spec:
        return _arithmetic(self.x)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        return _on_block(_widen(values[0]), self.at, self.dim, self._fresh)

    def _fresh(self, whole: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        return _normal(self.draw, block, *_moments(block))

    def __str__(self) -> str:
        return f"{self.x} with {self.at} redrawn"


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


def _moments(block: torch.Tensor) -> tuple[float, float]:
    """Mean and (population) standard deviation, summed by numpy in fp64: one thread, one order,
    everywhere.
    """
    import numpy as np

    if block.is_meta or block.numel() == 0:
        return 0.0, 1.0
    flat = block.reshape(-1).numpy()
    runs = range(0, len(flat), _RUN)
    mean = math.fsum(float(flat[i : i + _RUN].sum(dtype=np.float64)) for i in runs) / len(flat)
    squares = (np.square(flat[i : i + _RUN].astype(np.float64) - mean) for i in runs)
    return mean, math.sqrt(math.fsum(float(s.sum()) for s in squares) / len(flat))


def _normal(draw: Draw, like: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    import numpy as np
    import torch

    if like.is_meta:
        return torch.empty_like(like)
    drawn = torch.from_numpy(draw.generator().standard_normal(tuple(like.shape), dtype=np.float32))
    return drawn.to(like.dtype).mul_(std).add_(mean)


def _on_block(
    x: torch.Tensor,
    at: Indices,
    dim: int,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`x` whose slices `at` of `dim` are `change(x, slices)`, in place."""
    import torch

    index = torch.from_numpy(at.indices()).to(x.device)
    return x.index_copy_(dim, index, change(x, x.index_select(dim, index)))
