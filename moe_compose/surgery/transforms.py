"""The closed set of tensor functions that surgery is written in.

A transform is a frozen record: tensors in, one tensor out. It prints itself, it equals another that
does the same (so plans have digests), and it knows its output's dtype, shape and size without
running. Transforms nest; the leaves read a source tensor or make one from nothing:

    Cast(Scale(Take(Read("dense", up), rows), sqrt(2)), "BF16")

Three ways to carry one out, cheapest first (`surgery.evaluate` picks):

* **bytes**: `Read`, `Reshape`, `Take` of rows, `Stack` and `Concat` along the first dimension only
  move bytes; nothing is decoded, whatever the dtype.
* **pieces**: `elementwise` transforms run on one flat piece at a time, so a cast never holds a
  whole tensor.
* **whole**: the rest hold their own inputs and output, and nothing else.

This module holds the base and what only moves values; `surgery.arithmetic` holds what computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe_compose.checkpoint.source import DTYPE_BITS, TensorInfo, nbytes_of
from moe_compose.errors import PlanError
from moe_compose.surgery.indices import Indices, Picks, Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Spec:
    """What a transform gives: safetensors dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> Spec:
        return cls(dtype, shape, nbytes_of(dtype, shape))


@dataclass(frozen=True)
class Transform:
    """Base: `inputs` are transforms, `spec` says what comes out, `apply` makes it from the inputs'
    values.

    `apply` works on any device, the meta device included; that is how a plan checks its declared
    shapes.
    """

    elementwise: ClassVar[bool] = False

    #: Inputs that all are one number throughout give that number throughout.
    keeps_constants: ClassVar[bool] = False

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
class Unary(Transform):
    """Base of transforms of one tensor."""

    x: Transform

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Take(Unary):
    """Positions `at` of dimension `dim`, in that order; along the first one these are bytes."""

    at: Rows | Picks | Indices
    dim: int = 0
    keeps_constants: ClassVar[bool] = True

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
class Reshape(Unary):
    """The same values, in the same order, under another shape."""

    shape: tuple[int, ...]
    keeps_constants: ClassVar[bool] = True

    @property
    def spec(self) -> Spec:
        s = self.x.spec
        if math.prod(s.shape) != math.prod(self.shape):
            raise PlanError(f"{self.x} of shape {list(s.shape)} cannot have {list(self.shape)}")
        return Spec(s.dtype, self.shape, s.nbytes)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].reshape(self.shape)

    def __str__(self) -> str:
        return str(self.x)


@dataclass(frozen=True)
class _Many(Transform):
    xs: tuple[Transform, ...]
    keeps_constants: ClassVar[bool] = True

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


def _agree(xs: tuple[Transform, ...], what: Callable[[Spec], object], verb: str) -> Spec:
    specs = [x.spec for x in xs]
    kinds = {what(s) for s in specs}
    if len(kinds) != 1:
        raise PlanError(f"cannot {verb} tensors that differ: {', '.join(sorted(map(str, kinds)))}")
    return specs[0]
