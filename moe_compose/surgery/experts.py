"""The sparse half of an upcycled layer: router, routed experts, shared expert, as transforms of one
dense FFN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import Architecture, MoE
from moe_compose.architectures.base import Matrices, RouterTensor
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.surgery.arithmetic import Full, Noise, Random, Redraw, Scale, cast
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.indices import Indices, Picks, Rows, Sample, SampleSlice
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.preservation import default_router_std, output_factor, split_factor
from moe_compose.surgery.transforms import Concat, Read, Stack, Take, Transform

if TYPE_CHECKING:
    from moe_compose.surgery.upcycle_options import UpcycleOptions


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


def read_ffn(source: TensorSource, form: Architecture, layer: int, key: str = "dense") -> FFN:
    """The dense FFN of a layer, fused gate and up taken apart.

    Raises:
        CheckpointError: a matrix is missing, or has not the size that the config states.
    """
    assert form.mlp is not None
    width = form.width.integer(source.config)
    shapes = form.mlp.shapes(width, form.hidden.integer(source.config))

    def read(template: str) -> Transform:
        name = template.format(i=layer)
        if name not in source.tensors:
            raise CheckpointError(f"{source.label} has no {name}, which {form.model_type} requires")
        found, stated = source.tensors[name].shape, shapes[template]
        if found != stated:
            raise CheckpointError(
                f"{name} of {source.label} has shape {list(found)}, its config.json says "
                f"{list(stated)} ({form.width.name} {width})"
            )
        return Read(key, source.tensors[name])

    if form.mlp.gate_up:
        both = read(form.mlp.gate_up)
        gate, up = Take(both, Rows(0, width)), Take(both, Rows(width, 2 * width))
        return FFN(gate, up, read(form.mlp.down))
    return FFN(read(form.mlp.gate), read(form.mlp.up), read(form.mlp.down))


def ffn_dtype(source: TensorSource, form: Architecture) -> str:
    """The safetensors dtype of the first layer's FFN."""
    return read_ffn(source, form, 0).down.spec.dtype


def sparse_layer(
    source: TensorSource,
    dense: Architecture,
    form: Architecture,
    config: Mapping[str, Any],
    layer: int,
    options: UpcycleOptions,
    dtype: str | None,
) -> list[OutputTensor]:
    """Router, experts and shared expert of one layer.

    Args:
        source: the dense checkpoint.
        dense: its form.
        form: the target's form.
        config: the target's config.
        layer: decoder layer.
        options: of the upcycle.
        dtype: safetensors dtype of the result; None keeps the FFN's own.
    """
    assert form.experts is not None
    moe = form.moe(config)
    ffn = read_ffn(source, dense, layer)
    stored = dtype or ffn.down.spec.dtype
    experts = [
        _expert(ffn, form, config, layer, e, options).stored_as(stored)
        for e in range(moe.num_experts)
    ]
    made = dict(_routed(form.experts, experts, layer))
    made |= _router(form, config, moe, layer, options)
    if form.shared and moe.shared_width:
        made |= dict(_shared(form, ffn, moe.shared_width, layer, options, stored))
    pinned = {t.name.format(i=layer): t.dtype for t in form.router if t.dtype}
    return [OutputTensor(n, cast(x, pinned.get(n) or stored)) for n, x in made.items()]


def dense_layer(
    source: TensorSource, dense: Architecture, lie: Matrices, layer: int, dtype: str | None
) -> list[OutputTensor]:
    """The FFN of a layer that keeps it, under the target's names."""
    ffn = read_ffn(source, dense, layer)
    if dtype is not None:
        ffn = ffn.stored_as(dtype)
    return [OutputTensor(t.format(i=layer), _matrix(lie, t, ffn)) for t in lie.names]


def _expert(
    ffn: FFN,
    form: Architecture,
    config: Mapping[str, Any],
    layer: int,
    expert: int,
    options: UpcycleOptions,
) -> FFN:
    """What expert `expert` of `layer` starts as, by the method."""
    width, granularity = ffn.gate.spec.shape[0], options.granularity
    part = width // granularity
    replica, shard = divmod(expert, granularity)
    name, seed = f"layer {layer} expert {expert}", options.seed
    count = round(options.ratio * part)
    chosen = Sample(Draw(seed, f"{name} neurons"), part, count)
    if options.method in ("shuffle", "shared"):
        if granularity > 1:
            order = Sample(Draw(seed, f"layer {layer} replica {replica}"), width, width, False)
            ffn = ffn.neurons(SampleSlice(order, shard * part, (shard + 1) * part))
        fresh = ffn.redrawn(chosen, seed, name)
        return _silent(fresh) if options.method == "shared" else fresh
    if granularity > 1:
        ffn = ffn.neurons(Rows(shard * part, (shard + 1) * part))
    if options.method == "drop":
        ffn = ffn.redrawn(chosen, seed, name)
    elif options.method == "noise":
        ffn = ffn.noisy(chosen, options.noise_std, seed, name)
    return ffn.scaled(*split_factor(output_factor(form, config, options), granularity))


def _silent(ffn: FFN) -> FFN:
    """The same neurons with `W_d = 0`: no output, but a gradient."""
    return FFN(ffn.gate, ffn.up, Full(ffn.down.spec.shape, 0.0, ffn.down.spec.dtype))


def _routed(lie: Matrices, experts: list[FFN], layer: int) -> Iterator[tuple[str, Transform]]:
    """The experts' matrices under the names, and in the layout, of the family."""
    for template in lie.names:
        values = [_matrix(lie, template, x) for x in experts]
        if lie.stacked:
            yield template.format(i=layer), Stack(tuple(values))
        else:
            yield from ((template.format(i=layer, e=e), v) for e, v in enumerate(values))


def _matrix(lie: Matrices, template: str, ffn: FFN) -> Transform:
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


def _router(
    form: Architecture, config: Mapping[str, Any], moe: MoE, layer: int, options: UpcycleOptions
) -> dict[str, Transform]:
    return {
        t.name.format(i=layer): _router_tensor(t, form, config, moe, layer, options)
        for t in form.router
        if t.kind != "other" and not t.optional
    }


def _router_tensor(
    t: RouterTensor,
    form: Architecture,
    config: Mapping[str, Any],
    moe: MoE,
    layer: int,
    options: UpcycleOptions,
) -> Transform:
    """Rows drawn by the router's law; biases zero, scales one. Granular experts of one replica
    share a row (METHODS 2.2).
    """
    shape = t.shape(moe.num_experts, moe.hidden)
    if t.kind != "weight":
        return Full(shape, 1.0 if t.kind == "scale" else 0.0, "F32")
    law = options.router_init or ("uniform" if options.method == "drop" else "normal")
    std = options.router_std
    if std is None:
        std = default_router_std(form, config, options)
    if law == "zeros" or std == 0:
        return Full(shape, 0.0, "F32")
    draw = Draw(options.seed, f"layer {layer} router")
    grouped = options.method == "granular" and "independent-rows" not in options.allow
    if not grouped:
        return Random(shape, std, draw, law)
    replicas = moe.num_experts // options.granularity
    rows = Picks(tuple(e // options.granularity for e in range(moe.num_experts)))
    return Take(Random((replicas, moe.hidden), std, draw, law), rows)


def _shared(
    form: Architecture, ffn: FFN, width: int, layer: int, options: UpcycleOptions, dtype: str
) -> Iterator[tuple[str, Transform]]:
    """The shared expert: the FFN itself, or a silent one where the family demands one and the
    method has no use for it.

    Behind a sigmoid gate the gate row is 0 (the gate 0.5), so down is doubled.
    """
    assert form.shared is not None
    if options.method == "shared":
        made = ffn.scaled(1.0, 2.0 if form.shared.gate else 1.0)
    else:
        made = _silent(ffn.neurons(Rows(0, width)))
    lie, made = form.shared.matrices, made.stored_as(dtype)
    yield from ((t.format(i=layer), _matrix(lie, t, made)) for t in lie.names)
    if form.shared.gate:
        yield form.shared.gate.format(i=layer), Full((1, ffn.gate.spec.shape[1]), 0.0, "F32")
