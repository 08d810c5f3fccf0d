"""Where the neurons of an expert lie in its tensors, whatever the layout, and putting them in
another order.

Neuron n is row n of gate and up and column n of down; permuting all three together changes nothing
of what the expert computes.

Shapes: E experts, F neurons, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_compose.architectures.base import Matrices
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.surgery.indices import Fused, Order, Rows
from moe_compose.surgery.transforms import Read, Take, Transform

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of one expert, or its rows of a stacked one.

    Attributes:
        x: what reads it.
        dim: where its neurons are counted; None where it has none (the bias of down).
        fused: gate and up are both there, each neuron twice: `halves` or `pairs`.
    """

    x: Transform
    dim: int | None
    fused: str = ""

    def ordered(self, order: Order | None) -> Transform:
        """Its neurons in another order; as it is where None is given."""
        if order is None or self.dim is None or not order.moved:
            return self.x
        at = Fused(order, self.fused == "pairs") if self.fused else order
        return Take(self.x, at, self.dim)

    def by_neuron(self, value: torch.Tensor) -> torch.Tensor | None:
        """What belongs to each neuron, `[F, ...]` flattened to two dimensions, of its value."""
        if self.dim is None:
            return None
        rows = value.movedim(self.dim, 0)
        if self.fused == "halves":
            rows = rows.reshape(2, -1, *rows.shape[1:]).movedim(1, 0)
        elif self.fused == "pairs":
            rows = rows.reshape(-1, 2, *rows.shape[1:])
        return rows.reshape(rows.shape[0], -1)


def templates_of(matrices: Matrices) -> tuple[str, ...]:
    """All tensors of an expert, weights before biases."""
    return (*matrices.names, *(b for b in matrices.biases if b))


def part_of(
    matrices: Matrices, template: str, info: TensorInfo, expert: int, experts: int, key: str
) -> Part:
    """One expert's part of a tensor.

    Args:
        matrices: how the family's experts lie.
        template: which of them it is.
        info: the tensor.
        expert: whose; only told from the tensor where all experts share it.
        experts: how many share it.
        key: the plan's word for the source.
    """
    read = Read(key, info)
    dim, fused = _neurons(matrices, template)
    if "{e}" in template:
        return Part(read, dim, fused)
    each = info.shape[0] // experts
    rows = Take(read, Rows(expert * each, (expert + 1) * each))
    lead = 0 if matrices.flat else 1
    return Part(rows, None if dim is None else dim + lead, fused)


def parts_of(
    matrices: Matrices,
    tensors: Mapping[str, TensorInfo],
    layer: int,
    expert: int,
    experts: int,
    key: str,
) -> Iterator[Part]:
    """All parts of one expert that a checkpoint has."""
    for template in templates_of(matrices):
        name = template.format(i=layer, e=expert)
        if name in tensors:
            yield part_of(matrices, template, tensors[name], expert, experts, key)


def _neurons(matrices: Matrices, template: str) -> tuple[int | None, str]:
    """Dimension of the neurons in one expert's tensor, and how gate and up share it."""
    weights = dict(zip(matrices.biases, matrices.names, strict=False))
    of, bias = weights.get(template, template), template in weights
    fused = ""
    if of == matrices.gate_up and of:
        fused = "pairs" if matrices.interleaved else "halves"
    if of == matrices.down:
        if bias:
            return None, ""
        return (0 if matrices.transposed or matrices.flat else 1), ""
    return (1 if matrices.transposed and not bias else 0), fused
