"""What changed between two checkpoints, or plans of such.

Every tensor is hashed once, expert by expert; only what changed is read again, to say how far it
is from what it was. At most a tensor of each side is in memory, of tensors on the disk one expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.reporting.contents import (
    Contents,
    Hashed,
    Piece,
    Pieces,
    contents_of,
    hash_pieces,
)
from moe_compose.reporting.difference import (
    Difference,
    ExpertChange,
    LayerChange,
    Side,
    Status,
    TensorChange,
)
from moe_compose.reporting.inspect import inspect
from moe_compose.reporting.matching import Identity, match
from moe_compose.reporting.surroundings import config_changes, file_changes
from moe_compose.surgery import evaluate
from moe_compose.surgery.indices import Rows
from moe_compose.surgery.shared_tensors import natural
from moe_compose.surgery.transforms import Read, Reshape, Take

if TYPE_CHECKING:
    from torch import Tensor

#: Elements compared at a time, in fp64.
STEP = 1 << 20


def diff(
    before: TensorSource,
    after: TensorSource,
    *,
    workers: int | None = None,
    progress: Hashed | None = None,
) -> Difference:
    """What changed from one checkpoint to another.

    An expert of `after` is *moved* if an expert of the same layer of `before` has the same bytes
    under another index, and *copied* if that one is there already. One whose bytes are new is
    the one of `before` that has its rows of the router, else the one of its index, and it
    *changed*; or else it was added.

    Args:
        before: a checkpoint with its weights, or a plan.
        after: another.
        workers: threads that hash files; by default as many as there are processors, up to four.
        progress: told the bytes that are hashed, and how many there are.

    Returns:
        The difference; what is in `same` was compared byte by byte, through SHA-256.

    Raises:
        CheckpointError: weights cannot be read.

    Example:
        >>> diff(moe, prune(moe, stats, PruneOptions(keep=4))).experts      # doctest: +SKIP
        Counter({'removed': 48, 'moved': 36, 'same': 12})
    """
    both = _Both(contents_of(before), contents_of(after), workers, progress)
    tensors, same = both.tensors()
    files, same_files = file_changes(before, after)
    return Difference(
        before=_side(before),
        after=_side(after),
        config=tuple(config_changes(before.config, after.config)),
        layers=tuple(both.layers()),
        tensors=tuple(tensors),
        same_tensors=same,
        files=files,
        same_files=same_files,
        notes=tuple(both.notes()),
    )


class _Both:
    """Two contents, hashed."""

    def __init__(
        self, a: Contents, b: Contents, workers: int | None, progress: Hashed | None
    ) -> None:
        self._a, self._b = a, b
        self._hash_a, self._hash_b = hash_pieces([a, b], workers, progress)
        self._read_a, self._read_b = _Reader(a.source), _Reader(b.source)

    def notes(self) -> Iterator[str]:
        for side in (self._a, self._b):
            if side.note:
                yield f"{side.source.label}: experts are not told apart ({side.note})"
        a, b = self._a.layout, self._b.layout
        if a and b and not a & b:
            yield "the two store experts under different names, so that none can be the same"
        if told := self._renamed():
            yield told

    def _renamed(self) -> str:
        """New tensors that hold the bytes of one that is gone: an FFN that became an expert, or an
        expert that was taken out.
        """
        a = {n: p for n, p in _whole(self._a).items() if n not in self._b.source.tensors}
        b = {n: p for n, p in _whole(self._b).items() if n not in self._a.source.tensors}
        known = {(self._a.kind(p), self._hash_a[p]) for p in a.values()}
        held = sum((self._b.kind(p), self._hash_b[p]) in known for p in b.values())
        if not held:
            return ""
        return f"{held} of {len(b)} new tensors hold the bytes of tensors that are gone"

    def layers(self) -> Iterator[LayerChange]:
        blocks = dict.fromkeys([*self._a.experts, *self._b.experts])
        for block in sorted(blocks, key=natural):
            yield LayerChange(block, tuple(self._measured(block, self._experts(block))))

    def _experts(self, block: str) -> list[ExpertChange]:
        """Who became whom, by hashes alone."""
        a, b = self._identities(block)
        rows_a, rows_b = self._identities(block, rows=True)
        was = match(a, b, rows_a, rows_b)
        homes = {i: e for e, i in sorted(was.items(), reverse=True)}  # of copies, the first
        homes |= {i: e for e, i in was.items() if e == i}
        found = []
        for e in sorted(b):
            i = was.get(e)
            if i is None:
                found.append(ExpertChange(e, None, "added"))
                continue
            equal: Status = "same" if i == e else "moved" if homes[i] == e else "copied"
            status: Status = equal if a[i] == b[e] else "changed"
            row = rows_a[i] == rows_b[e] if i in rows_a and e in rows_b else None
            found.append(ExpertChange(e, i, status, row=row))
        gone = sorted(a.keys() - set(was.values()))
        return [*found, *(ExpertChange(None, i, "removed") for i in gone)]

    def _identities(
        self, block: str, rows: bool = False
    ) -> tuple[dict[int, Identity], dict[int, Identity]]:
        sides = ((self._a, self._hash_a), (self._b, self._hash_b))
        tables = [(side, hashes, side.rows if rows else side.experts) for side, hashes in sides]
        a, b = (
            {e: _identity(side, hashes, pieces) for e, pieces in table.get(block, {}).items()}
            for side, hashes, table in tables
        )
        return a, b

    def _measured(self, block: str, experts: Iterable[ExpertChange]) -> Iterator[ExpertChange]:
        """With how far what changed is from what it was."""
        found = list(experts)
        changed = [e for e in found if e.status == "changed"]
        far = self._distances(self._a.experts, self._b.experts, block, changed)
        apart = [e for e in found if e.row is False]
        rows = self._distances(self._a.rows, self._b.rows, block, apart)
        for e in found:
            yield replace(e, distance=far.get(e.expert), row_distance=rows.get(e.expert))

    def _distances(
        self,
        before: Mapping[str, Mapping[int, Pieces]],
        after: Mapping[str, Mapping[int, Pieces]],
        block: str,
        pairs: Iterable[ExpertChange],
    ) -> dict[int | None, float]:
        """Expert → ‖b − a‖ / ‖a‖ over its pieces; tensor by tensor, then expert by expert."""
        squares: dict[int | None, list[tuple[float, float]]] = {}
        known: dict[int | None, list[tuple[str, Piece, Piece]]] = {}
        for e in pairs:
            assert e.was is not None and e.expert is not None
            a, b = before[block][e.was], after[block][e.expert]
            if a.keys() == b.keys() and all(self._comparable(a[n], b[n]) for n in a):
                known[e.expert] = [(n, a[n], b[n]) for n in sorted(a)]
        for name in sorted({n for pieces in known.values() for n, _, _ in pieces}):
            for expert, pieces in known.items():
                for x, y in ((x, y) for n, x, y in pieces if n == name):
                    squares.setdefault(expert, []).append(self._squares(x, y))
        return {e: _ratio(found) for e, found in squares.items()}

    def _comparable(self, a: Piece, b: Piece) -> bool:
        (dtype_a, shape_a), (dtype_b, shape_b) = self._a.kind(a), self._b.kind(b)
        return shape_a == shape_b and {dtype_a, dtype_b} <= FLOAT_DTYPES.keys()

    def _squares(self, a: Piece, b: Piece) -> tuple[float, float]:
        return squares_of(self._read_a.values(a), self._read_b.values(b))

    def tensors(self) -> tuple[list[TensorChange], int]:
        """Those outside the experts that differ, and how many do not."""
        a, b = self._a.others, self._b.others
        found, same = [], 0
        for name in sorted(a.keys() | b.keys(), key=natural):
            x, y = a.get(name), b.get(name)
            before = _said(self._a, x) if x else None
            after = _said(self._b, y) if y else None
            if x is None or y is None:
                found.append(TensorChange(name, "added" if y else "removed", before, after))
            elif before == after and self._hash_a[x] == self._hash_b[y]:
                same += 1
            else:
                far = _ratio([self._squares(x, y)]) if self._comparable(x, y) else None
                found.append(TensorChange(name, "changed", before, after, far))
        return found, same


def _whole(side: Contents) -> dict[str, Piece]:
    """The tensors that are one piece."""
    return {p.name: p for p in side.pieces() if not p.parts}


class _Reader:
    """Values of pieces as flat tensors. Of a tensor that must be computed whole, the last one is
    kept, for the next expert.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._kept: tuple[str, Tensor] | None = None

    def values(self, piece: Piece) -> Iterator[Tensor]:
        if not piece.parts:
            return self._source.stream(piece.name)
        info = self._source.tensors[piece.name]
        if self._source.extents(piece.name) is not None:
            flat = Reshape(Read("source", info), (piece.parts, info.numel // piece.parts))
            rows = Take(flat, Rows(piece.part, piece.part + 1))
            return iter((evaluate.value(rows, {"source": self._source}).flatten(),))
        if self._kept is None or self._kept[0] != piece.name:
            self._kept = piece.name, self._source.read(piece.name)
        return iter((self._kept[1].reshape(piece.parts, -1)[piece.part],))


def squares_of(a: Iterator[Tensor], b: Iterator[Tensor]) -> tuple[float, float]:
    """Σ(b − a)² and Σa² in fp64, of two flat streams of as many elements, cut anywhere."""
    x, y = next(a, None), next(b, None)
    total = base = 0.0
    while x is not None and y is not None:
        count = min(len(x), len(y), STEP)
        p, q = x[:count].double(), y[:count].double()
        total += float((q - p).square().sum())
        base += float(p.square().sum())
        x = x[count:] if count < len(x) else next(a, None)
        y = y[count:] if count < len(y) else next(b, None)
    return total, base


def _ratio(squares: Iterable[tuple[float, float]]) -> float:
    """‖b − a‖ / ‖a‖; infinite where a is 0 and b is not."""
    total, base = map(sum, zip(*squares, strict=True))
    return math.sqrt(total / base) if base else math.inf if total else 0.0


def _identity(side: Contents, hashes: Mapping[Piece, str], pieces: Pieces) -> Identity:
    return tuple((n, *side.kind(p), hashes[p]) for n, p in sorted(pieces.items()))


def _said(side: Contents, piece: Piece) -> str:
    dtype, shape = side.kind(piece)
    return f"{dtype} {list(shape)}"


def _side(source: TensorSource) -> Side:
    found = inspect(source)
    return Side(
        label=found.checkpoint,
        digest=found.digest,
        model_type=found.model_type,
        experts=found.experts.num_experts if found.experts else None,
        top_k=found.experts.top_k if found.experts else None,
        sparse_layers=len(found.sparse_layers),
        total=found.total,
        active=found.parameters.active if found.parameters else None,
        tensors=len(source.tensors),
        bytes=found.bytes,
    )
