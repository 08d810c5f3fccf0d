"""The closed set of tensor functions that surgery is written in.

A transform is a frozen record: tensors in, one tensor out. It prints itself, it equals another that
does the same (so plans have digests), and it knows its output's dtype, shape and size without
running. Transforms nest; the leaves read a source tensor or make one from nothing:

    Cast(Scale(Take(Read("dense", up), rows), sqrt(2)), "BF16")

Three ways to carry one out, cheapest first (`surgery.evaluate` picks):

* **bytes**: `Read`, `Take` of rows, `Stack` and `Concat` along the first dimension only move bytes;
  nothing is decoded, whatever the dtype.
* **pieces**: `elementwise` transforms run on one flat piece at a time, so a cast never holds a
  whole tensor.
* **whole**: the rest hold their own inputs and output, and nothing else.

Arithmetic is done in fp32 (fp64 for fp64 inputs) and its output *is* fp32: a single `Cast` at the
end rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from moe_compose.checkpoint.source import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    TensorInfo,
    nbytes_of,
    torch_dtype,
)
from moe_compose.errors import PlanError
from moe_compose.surgery.draws import Draw

if TYPE_CHECKING:
    import numpy as np
    import torch


#: Elements that a reduction takes at a time: fp64 copies stay small.
_RUN = 1 << 20


@dataclass(frozen=True, slots=True)
class Spec:
    """What a transform gives: safetensors dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> Spec:
        return cls(dtype, shape, nbytes_of(dtype, shape))


class Indices(Protocol):
    """A list of positions that may be drawn only when needed: `Sample`, `SampleSlice`, `Rows`."""

    def indices(self) -> np.ndarray:
        """int64, in order."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions `start:stop`."""

    start: int
    stop: int

    def indices(self) -> np.ndarray:
        import numpy as np

        return np.arange(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class Picks:
    """Positions listed one by one, repeats allowed."""

    positions: tuple[int, ...]

    def indices(self) -> np.ndarray:
        import numpy as np

        return np.asarray(self.positions, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def __str__(self) -> str:
        shown = ",".join(map(str, self.positions[:8]))
        return shown + (f",… ({len(self.positions)})" if len(self.positions) > 8 else "")


@dataclass(frozen=True)
class Transform:
    """Base: `inputs` are transforms, `spec` says what comes out, `apply` makes it from the inputs'
    values.

    `apply` works on any device, the meta device included; that is how a plan checks its declared
    shapes.
    """

    elementwise: ClassVar[bool] = False

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return ()

    @property
    def spec(self) -> Spec:
        raise NotImplementedError

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        """The output's values from the inputs' values, whose memory may be reused.

        Args:
            values: one tensor per input, in order. Elementwise transforms also accept flat pieces.
        """
        raise NotImplementedError

    def leaves(self) -> Iterator[Read]:
        """Every `Read` below."""
        for x in self.inputs:
            yield from x.leaves()


@dataclass(frozen=True)
class Read(Transform):
    """A source's tensor as it is. `source` is the plan's word for the checkpoint."""

    source: str
    tensor: TensorInfo

    @property
    def spec(self) -> Spec:
        return Spec(self.tensor.dtype, self.tensor.shape, self.tensor.nbytes)

    def leaves(self) -> Iterator[Read]:
        yield self

    def __str__(self) -> str:
        return f"{self.source}:{self.tensor.name}"


@dataclass(frozen=True)
class _Unary(Transform):
    x: Transform

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Take(_Unary):
    """Positions `at` of dimension `dim`, in that order; along the first one these are bytes."""

    at: Rows | Picks | Indices
    dim: int = 0

    @property
    def spec(self) -> Spec:
        s = self.x.spec
        if not 0 <= self.dim < len(s.shape):
            raise PlanError(
                f"cannot take along dimension {self.dim} of a tensor of shape {list(s.shape)}"
            )
        shape = (*s.shape[: self.dim], len(self.at), *s.shape[self.dim + 1 :])
        if s.dtype in DTYPE_BITS:
            return Spec.of(s.dtype, shape)
        return Spec(s.dtype, shape, s.nbytes * math.prod(shape) // max(1, math.prod(s.shape)))

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        (x,) = values
        if isinstance(self.at, Rows):
            return x.narrow(self.dim, self.at.start, len(self.at)).contiguous()
        index = torch.from_numpy(self.at.indices()).to(x.device)
        return x.index_select(self.dim, index)

    def __str__(self) -> str:
        return f"{self.x}[{'cols ' if self.dim else ''}{self.at}]"


@dataclass(frozen=True)
class _Many(Transform):
    xs: tuple[Transform, ...]

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return self.xs

    def _listed(self) -> str:
        runs = (
            f"{self.xs[0]}, … {len(self.xs)} in all"
            if len(self.xs) > 4
            else ", ".join(map(str, self.xs))
        )
        return f"{type(self).__name__.lower()}({runs})"


@dataclass(frozen=True)
class Stack(_Many):
    """Tensors of one shape under a new first dimension."""

    @property
    def spec(self) -> Spec:
        s = _agree(self.xs, lambda x: (x.dtype, x.shape), "stack")
        return Spec(s.dtype, (len(self.xs), *s.shape), s.nbytes * len(self.xs))

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.stack(values)

    def __str__(self) -> str:
        return self._listed()


@dataclass(frozen=True)
class Concat(_Many):
    """Tensors one after another along the first dimension."""

    @property
    def spec(self) -> Spec:
        s = _agree(self.xs, lambda x: (x.dtype, x.shape[1:]), "concatenate")
        specs = [x.spec for x in self.xs]
        return Spec(
            s.dtype, (sum(x.shape[0] for x in specs), *s.shape[1:]), sum(x.nbytes for x in specs)
        )

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat(values)

    def __str__(self) -> str:
        return self._listed()


@dataclass(frozen=True)
class Scale(_Unary):
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
class Cast(_Unary):
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
class Noise(_Unary):
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
class Redraw(_Unary):
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


def _agree(xs: tuple[Transform, ...], what: Callable[[Spec], object], verb: str) -> Spec:
    specs = [x.spec for x in xs]
    kinds = {what(s) for s in specs}
    if len(kinds) != 1:
        raise PlanError(f"cannot {verb} tensors that differ: {', '.join(sorted(map(str, kinds)))}")
    return specs[0]


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
