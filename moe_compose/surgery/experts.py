"""The sparse half of an upcycled layer: router, routed experts, shared expert, as transforms of one
dense FFN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import Architecture, MoE
from moe_compose.architectures.base import Matrices, RouterTensor
from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.arithmetic import Full, Random, cast
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.ffn import FFN, experts_on_disk, matrix, read_ffn
from moe_compose.surgery.indices import Picks, Rows, Sample, SampleSlice
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.preservation import default_router_std, output_factor, split_factor
from moe_compose.surgery.transforms import Take, Transform

if TYPE_CHECKING:
    from moe_compose.surgery.upcycle_options import UpcycleOptions


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
    ffn = read_ffn(source, dense, layer)
    stored = dtype or ffn.down.spec.dtype
    experts = [
        _expert(ffn, form, config, layer, e, options).stored_as(stored)
        for e in range(form.moe(config).num_experts)
    ]
    return sparse_half(form, config, layer, ffn, experts, options, stored)


def sparse_half(
    form: Architecture,
    config: Mapping[str, Any],
    layer: int,
    ffn: FFN,
    experts: Sequence[FFN],
    options: UpcycleOptions,
    stored: str,
    given: Mapping[str, Transform] | None = None,
) -> list[OutputTensor]:
    """A layer's sparse half under the target's names, in its layout.

    Args:
        form: the target's form.
        config: the target's config.
        layer: decoder layer.
        ffn: the dense FFN, for the shared expert of a family that has one.
        experts: the routed experts.
        options: of the router, and what the shared expert is.
        stored: safetensors dtype.
        given: tensors of the router by name, instead of those that `options` describe.
    """
    assert form.experts is not None
    moe = form.moe(config)
    made = dict(experts_on_disk(form.experts, experts, layer))
    made |= _router(form, config, moe, layer, options) | dict(given or {})
    if form.shared and moe.shared_width:
        made |= dict(_shared(form, ffn, moe.shared_width, layer, options, stored))
    pinned = {t.name.format(i=layer): t.dtype for t in form.router if t.dtype}
    return [OutputTensor(n, cast(x, pinned.get(n) or stored)) for n, x in made.items()]


def dense_layer(
    source: TensorSource,
    dense: Architecture,
    lie: Matrices,
    layer: int,
    dtype: str | None,
    key: str,
) -> list[OutputTensor]:
    """The FFN of a layer that keeps it, under the target's names."""
    ffn = read_ffn(source, dense, layer, key)
    if dtype is not None:
        ffn = ffn.stored_as(dtype)
    return [OutputTensor(t.format(i=layer), matrix(lie, t, ffn)) for t in lie.names]


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
        return fresh.silent() if options.method == "shared" else fresh
    if granularity > 1:
        ffn = ffn.neurons(Rows(shard * part, (shard + 1) * part))
    if options.method == "drop":
        ffn = ffn.redrawn(chosen, seed, name)
    elif options.method == "noise":
        ffn = ffn.noisy(chosen, options.noise_std, seed, name)
    return ffn.scaled(*split_factor(output_factor(form, config, options), granularity))


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


#: sigmoid(x) is 0.5 to the last bit. Not 0: llama.cpp divides silu(x) by x, which is NaN there.
_NEARLY_ZERO = 2.0**-60


def _shared(
    form: Architecture, ffn: FFN, width: int, layer: int, options: UpcycleOptions, dtype: str
) -> Iterator[tuple[str, Transform]]:
    """The shared expert: the FFN itself, or a silent one where the family demands one and the
    method has no use for it.

    Behind a sigmoid gate the gate row is as good as 0 (the gate 0.5), so down is doubled.
    """
    assert form.shared is not None
    if options.method == "shared":
        made = ffn.scaled(1.0, 2.0 if form.shared.gate else 1.0)
    else:
        made = ffn.neurons(Rows(0, width)).silent()
    lie, made = form.shared.matrices, made.stored_as(dtype)
    yield from ((t.format(i=layer), matrix(lie, t, made)) for t in lie.names)
    if form.shared.gate:
        row = Full((1, ffn.gate.spec.shape[1]), _NEARLY_ZERO, "F32")
        yield form.shared.gate.format(i=layer), row
