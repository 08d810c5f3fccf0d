"""Everything of a dense checkpoint that is not a sparse layer's FFN: carried over, renamed, split
or filled in as the pair asks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_compose.architectures import Architecture, Twin
from moe_compose.architectures.base import Key
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource, common_dtype
from moe_compose.surgery.arithmetic import Full, cast
from moe_compose.surgery.experts import dense_layer
from moe_compose.surgery.ffn import Adapted, as_it_is
from moe_compose.surgery.indices import Picks, Rows
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.transforms import Read, Take, Transform

#: Buffers that old checkpoints store and every model recomputes.
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which layer 10 follows layer 9."""
    return tuple((0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p)


def layer_of(template: str, name: str) -> int | None:
    """The layer for which `template` gives `name`; -1 for a template without one; None when it
    gives another name.
    """
    pattern = re.escape(template).replace(r"\{i\}", r"(\d+)")
    m = re.fullmatch(pattern, name)
    return None if m is None else int(m[1]) if m.groups() else -1


def carried(
    source: TensorSource,
    dense: Architecture,
    form: Architecture,
    twin: Twin,
    config: Mapping[str, Any],
    dtype: str | None,
    dropped: dict[str, str],
    key: str = "dense",
    adapted: Adapted = as_it_is,
) -> list[OutputTensor]:
    """All outputs outside routers and experts: the dense layers' FFNs too.

    Args:
        source: the dense checkpoint.
        dense: its form.
        form: the target's form.
        twin: how the two pair.
        config: the target's config.
        dtype: converts floating-point tensors; None copies bytes.
        dropped: receives `key:tensor` → reason for what is left behind on purpose.
        key: the plan's word for the source.
        adapted: what is put on each tensor.
    """
    assert dense.mlp is not None
    moe = form.moe(config)
    outputs: list[OutputTensor] = []
    for layer, sparse in enumerate(moe.sparse):
        if form.mlp is not None and (form.parallel_mlp or not sparse):
            outputs += dense_layer(source, dense, form.mlp, layer, dtype, key)
    for name, info in source.tensors.items():
        if any(layer_of(t, name) is not None for t in dense.mlp.names):
            continue
        if _RECOMPUTED.search(name):
            dropped[f"{key}:{name}"] = "rotary frequencies, recomputed by the model"
            continue
        if name.startswith(dense.mtp):
            dropped[f"{key}:{name}"] = "a multi-token-prediction layer, whose FFN stayed dense"
            continue
        for target, value in _homes(Read(key, info), twin, config, adapted):
            if dtype is not None and info.dtype in FLOAT_DTYPES:
                value = cast(value, dtype)
            outputs.append(OutputTensor(target, value))
    return outputs + list(_fills(twin, form, config, dtype or common_dtype(source)))


def _homes(
    read: Read, twin: Twin, config: Mapping[str, Any], adapted: Adapted
) -> Iterator[tuple[str, Transform]]:
    """Target names and values that one source tensor becomes."""
    value = adapted(read)
    name = read.tensor.name
    for split in twin.splits:
        if (layer := layer_of(split.source, name)) is not None:
            start = 0
            for target, keys in split.parts:
                stop = start + _product(keys, config)
                yield target.format(i=layer), Take(value, Rows(start, stop))
                start = stop
            return
    if any(layer_of(t, name) is not None for t in twin.interleave):
        value = Take(value, _interleaved(read.tensor.shape[0], _head_dim(config)))
    for old, new in twin.copies.items():
        if (layer := layer_of(old, name)) is not None:
            yield new.format(i=layer), value
    for old, new in twin.renames.items():
        if (layer := layer_of(old, name)) is not None:
            name = new.format(i=layer)
            break
    yield name, value


def _interleaved(rows: int, head_dim: int) -> Picks:
    """Row order that turns half-split rotary pairs (m, m + d/2) into neighbours (2m, 2m + 1)."""
    half = head_dim // 2
    pair = [m + half * side for m in range(half) for side in (0, 1)]
    return Picks(tuple(h * head_dim + r for h in range(rows // head_dim) for r in pair))


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _product(keys: tuple[Key, ...], config: Mapping[str, Any]) -> int:
    return math.prod(k.integer(config) for k in keys)


def _fills(
    twin: Twin, form: Architecture, config: Mapping[str, Any], dtype: str
) -> Iterator[OutputTensor]:
    moe = form.moe(config)
    for fill in twin.fills:
        layers = moe.sparse_layers if fill.sparse_only else range(len(moe.sparse))
        shape = tuple(_product(keys, config) for keys in fill.shape)
        value = Full(shape, fill.value, fill.dtype or dtype)
        names = {fill.name.format(i=i) for i in layers}
        yield from (OutputTensor(n, value) for n in names)
