"""A feed-forward network as transforms: read from a dense layer or from an expert, and laid out as
a family stores it.

Three plain matrices, whatever the names and the layout: `gate, up: [F, D]`, `down: [D, F]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe_compose.architectures import Architecture
from moe_compose.architectures.base import Matrices
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.surgery.arithmetic import Full, Noise, Redraw, Scale, cast
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.indices import Indices, Rows
from moe_compose.surgery.transforms import Concat, Read, Reshape, Stack, Take, Transform

#: What becomes of a tensor that is read: itself, or itself with an adapter on it.
Adapted = Callable[[Read], Transform]


@dataclass(frozen=True, slots=True)
class FFN:
    """Three matrices that belong together: `gate, up: [F, D]`, `down: [D, F]`. Neuron n is row n,
    row n, column n.
    """

    gate: Transform
    up: Transform
    down: Transform

    def neurons(self, at: Indices) -> FFN:
        """Only the neurons `at`."""
        return FFN(Take(self.gate, at), Take(self.up, at), Take(self.down, at, 1))

    def scaled(self, up: float, down: float) -> FFN:
        """`up` and `down` multiplied; the gate never is, SiLU not being homogeneous."""
        return FFN(
            self.gate,
            self.up if up == 1 else Scale(self.up, up),
            self.down if down == 1 else Scale(self.down, down),
        )

    def stored_as(self, dtype: str) -> FFN:
        """Each matrix rounded once, at the end, to `dtype`."""
        return FFN(cast(self.gate, dtype), cast(self.up, dtype), cast(self.down, dtype))

    def silent(self) -> FFN:
        """The same neurons with `W_d = 0`: no output, but a gradient."""
        return FFN(self.gate, self.up, Full(self.down.spec.shape, 0.0, self.down.spec.dtype))

    def redrawn(self, at: Indices, seed: int, name: str) -> FFN:
        """The neurons `at` redrawn in all three matrices, each from its own statistics."""
        return FFN(
            Redraw(self.gate, at, 0, Draw(seed, f"{name}.gate")),
            Redraw(self.up, at, 0, Draw(seed, f"{name}.up")),
            Redraw(self.down, at, 1, Draw(seed, f"{name}.down")),
        )

    def noisy(self, at: Indices, std: float, seed: int, name: str) -> FFN:
        """Noise on the neurons `at` in all three matrices."""
        return FFN(
            Noise(self.gate, at, 0, std, Draw(seed, f"{name}.gate")),
            Noise(self.up, at, 0, std, Draw(seed, f"{name}.up")),
            Noise(self.down, at, 1, std, Draw(seed, f"{name}.down")),
        )


def as_it_is(read: Read) -> Transform:
    """Nothing is put on a tensor."""
    return read


def read_ffn(
    source: TensorSource,
    form: Architecture,
    layer: int,
    key: str = "dense",
    adapted: Adapted = as_it_is,
) -> FFN:
    """The dense FFN of a layer, fused gate and up taken apart.

    Args:
        source: a dense checkpoint.
        form: its family's.
        layer: decoder layer.
        key: the plan's word for the source.
        adapted: what is put on each tensor (a LoRA adapter).

    Raises:
        CheckpointError: a matrix is missing, or has not the size that the config states.
    """
    assert form.mlp is not None
    width = form.width.integer(source.config)
    shapes = form.mlp.shapes(width, form.hidden.integer(source.config))

    def read(template: str) -> Transform:
        return adapted(_stated(source, form, template, template.format(i=layer), shapes, key))

    if form.mlp.gate_up:
        both = read(form.mlp.gate_up)
        gate, up = Take(both, Rows(0, width)), Take(both, Rows(width, 2 * width))
        return FFN(gate, up, read(form.mlp.down))
    return FFN(read(form.mlp.gate), read(form.mlp.up), read(form.mlp.down))


def read_expert(
    source: TensorSource,
    form: Architecture,
    layer: int,
    expert: int,
    key: str,
    adapted: Adapted = as_it_is,
) -> FFN:
    """One routed expert of a layer, whatever its layout.

    Args:
        source: an MoE.
        form: its family's, in the layout that the checkpoint has.
        layer: decoder layer.
        expert: its id.
        key: the plan's word for the source.
        adapted: what is put on each tensor (a LoRA adapter); not on stacked ones.

    Raises:
        CheckpointError: a matrix is missing, or has not the size that the config states.
        UnsupportedError: experts that are not three plain matrices.
    """
    lie = form.experts
    assert lie is not None
    if lie.biases or lie.transposed or lie.interleaved or lie.flat or not (lie.gate or lie.gate_up):
        raise UnsupportedError(
            f"experts of {form.model_type} are not three plain matrices (gate, up, down)"
        )
    moe = form.moe(source.config)
    count = moe.num_experts if lie.stacked else None
    shapes = lie.shapes(moe.expert_width, moe.hidden, count)

    def read(template: str) -> Transform:
        whole = _stated(source, form, template, template.format(i=layer, e=expert), shapes, key)
        if not lie.stacked:
            return adapted(whole)
        return Reshape(Take(whole, Rows(expert, expert + 1)), shapes[template][1:])

    if not lie.gate_up:
        return FFN(read(lie.gate), read(lie.up), read(lie.down))
    both, width = read(lie.gate_up), moe.expert_width
    return FFN(Take(both, Rows(0, width)), Take(both, Rows(width, 2 * width)), read(lie.down))


def _stated(
    source: TensorSource,
    form: Architecture,
    template: str,
    name: str,
    shapes: dict[str, tuple[int, ...]],
    key: str,
) -> Read:
    """A tensor of the shape that the config states."""
    if name not in source.tensors:
        raise CheckpointError(f"{source.label} has no {name}, which {form.model_type} requires")
    found, stated = source.tensors[name].shape, shapes[template]
    if found != stated:
        raise CheckpointError(
            f"{name} of {source.label} has shape {list(found)}, its config.json says {list(stated)}"
        )
    return Read(key, source.tensors[name])


def ffn_dtype(source: TensorSource, form: Architecture) -> str:
    """The safetensors dtype of the first layer's FFN."""
    return read_ffn(source, form, 0).down.spec.dtype


def experts_on_disk(
    lie: Matrices, experts: Sequence[FFN], layer: int
) -> Iterator[tuple[str, Transform]]:
    """The experts' matrices under the names, and in the layout, of the family."""
    for template in lie.names:
        values = [matrix(lie, template, x) for x in experts]
        if lie.stacked:
            yield template.format(i=layer), Stack(tuple(values))
        else:
            yield from ((template.format(i=layer, e=e), v) for e, v in enumerate(values))


def matrix(lie: Matrices, template: str, ffn: FFN) -> Transform:
    if template == lie.gate_up:
        return _fused(ffn.gate, ffn.up)
    return {lie.gate: ffn.gate, lie.up: ffn.up, lie.down: ffn.down}[template]


def _fused(gate: Transform, up: Transform) -> Transform:
    """Gate and up in one tensor; the source's own where it is that."""
    match gate, up:
        case Take(x, Rows(0, n), 0), Take(y, Rows(m, stop), 0):
            if x == y and n == m and stop == x.spec.shape[0]:
                return x
    return Concat((gate, up))
