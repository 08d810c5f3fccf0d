"""Carrying a transform out: as bytes where it only moves them, in pieces where it can, whole where
it must.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from moe_compose.checkpoint.folder import read_pieces
from moe_compose.checkpoint.source import (
    CHUNK_BYTES,
    TORCH_DTYPES,
    Extent,
    TensorSource,
    torch_dtype,
)
from moe_compose.errors import PlanError
from moe_compose.surgery.indices import Picks, Rows
from moe_compose.surgery.transforms import Concat, Read, Reshape, Stack, Take, Transform

if TYPE_CHECKING:
    import torch

Sources = Mapping[str, TensorSource]

#: Rows of at least so many bytes (experts of a stacked tensor) are read one by one, no others.
LARGE_ROW = 1 << 20


def extents(node: Transform, sources: Sources) -> tuple[Extent, ...] | None:
    """Where on disk the output's bytes already lie, in order; None when they must be computed.

    Args:
        node: the transform.
        sources: the checkpoints that its leaves name.
    """
    if isinstance(node, Read):
        return sources[node.source].extents(node.tensor.name)
    if isinstance(node, Reshape):
        return extents(node.x, sources)
    if isinstance(node, Stack | Concat):
        parts = [extents(x, sources) for x in node.inputs]
        known = [p for p in parts if p is not None]
        return sum(known, ()) if len(known) == len(parts) else None
    if isinstance(node, Take) and node.dim == 0:
        whole = extents(node.x, sources)
        return None if whole is None else _rows(whole, node)
    return None


def _rows(whole: tuple[Extent, ...], node: Take) -> tuple[Extent, ...] | None:
    """The byte ranges of rows of a tensor that lies at `whole`; None when rows do not start at
    whole bytes.
    """
    spec = node.x.spec
    row, rest = divmod(spec.nbytes, max(1, spec.shape[0]))
    if rest:
        return None
    if isinstance(node.at, Rows):
        return tuple(_cut(whole, node.at.start * row, node.at.stop * row))
    return tuple(
        e for r in node.at.indices() for e in _cut(whole, int(r) * row, (int(r) + 1) * row)
    )


def _cut(whole: tuple[Extent, ...], start: int, stop: int) -> Iterator[Extent]:
    """Bytes `start:stop` of the concatenation of `whole`."""
    at = 0
    for e in whole:
        lo, hi = max(start, at), min(stop, at + e.nbytes)
        if lo < hi:
            yield Extent(e.path, e.offset + lo - at, hi - lo)
        at += e.nbytes


def stream(node: Transform, sources: Sources) -> Iterator[torch.Tensor]:
    """The output as flat pieces in order. Holds one piece, except below a transform that needs its
    whole input.

    Args:
        node: the transform.
        sources: the checkpoints that its leaves name.
    """
    if isinstance(node, Read):
        yield from sources[node.source].stream(node.tensor.name)
    elif isinstance(node, Stack | Concat | Reshape):
        for x in node.inputs:
            yield from stream(x, sources)
    elif node.elementwise:
        for pieces in _side_by_side([stream(x, sources) for x in node.inputs]):
            yield node.apply(*pieces)
    else:
        whole = value(node, sources).reshape(-1)
        step = max(1, CHUNK_BYTES // whole.element_size())
        yield from (whole[i : i + step] for i in range(0, len(whole), step))


def _side_by_side(streams: Sequence[Iterator[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """The same stretch of several tensors of one size, cut where any of them is."""
    held = [next(s, None) for s in streams]
    while all(p is not None for p in held):
        pieces = [p for p in held if p is not None]
        size = min(map(len, pieces))
        yield [p[:size] for p in pieces]
        held = [
            p[size:] if len(p) > size else next(s, None)
            for p, s in zip(pieces, streams, strict=True)
        ]


def value(node: Transform, sources: Sources) -> torch.Tensor:
    """The whole output, in its shape.

    Args:
        node: the transform.
        sources: the checkpoints that its leaves name.
    """
    if isinstance(node, Read):
        return sources[node.source].read(node.tensor.name)
    if isinstance(node, Take) and _in_few_runs(node) and (found := extents(node, sources)):
        return _read(found, node)
    return node.apply(*(value(x, sources) for x in node.inputs))


def _in_few_runs(node: Take) -> bool:
    spec = node.x.spec
    large = node.dim == 0 and spec.nbytes >= LARGE_ROW * max(1, spec.shape[0])
    return isinstance(node.at, Rows) or (large and isinstance(node.at, Picks))


def _read(found: tuple[Extent, ...], node: Transform) -> torch.Tensor:
    """A tensor whose bytes lie at `found`, without reading what lies around them."""
    import torch

    spec = node.spec
    buffer = bytearray().join(p for e in found for p in read_pieces(e, e.nbytes))
    return torch.frombuffer(buffer, dtype=torch_dtype(spec.dtype)).reshape(spec.shape)


def check_on_meta(node: Transform) -> None:
    """Run the transform on the meta device and hold its declared spec to what comes out.

    Leaves that make a tensor from nothing are taken at their word: they state their own shape.

    Raises:
        PlanError: shape or dtype differ, or the transform does not accept its inputs.
    """
    spec = node.spec
    if any(leaf.tensor.dtype not in TORCH_DTYPES for leaf in node.leaves()):
        return  # torch has no such values: only bytes move, and the spec is all there is to say
    try:
        made = _meta(node)
    except (RuntimeError, IndexError, TypeError) as e:
        raise PlanError(f"{node} cannot be carried out: {e}") from e
    if tuple(made.shape) != spec.shape or made.dtype != torch_dtype(spec.dtype):
        raise PlanError(
            f"{node} declares {spec.dtype} {list(spec.shape)} "
            f"but gives {made.dtype} {list(made.shape)}"
        )


def _meta(node: Transform) -> torch.Tensor:
    import torch

    if node.inputs:
        return node.apply(*(_meta(x) for x in node.inputs))
    return torch.empty(node.spec.shape, dtype=torch_dtype(node.spec.dtype), device="meta")
