"""What a checkpoint holds, expert by expert, and the SHA-256 of each piece of it.

A tensor of all experts is cut at its rows, so that a piece belongs to one expert however the family
stores them. Bytes are hashed as they stream by; what two sources read from the same place in a file
is hashed once.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

from moe_compose.architectures import find
from moe_compose.architectures.parts import layout_of
from moe_compose.checkpoint.folder import read_pieces
from moe_compose.checkpoint.source import Extent, TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.surgery.roles import Role, Roles

#: Bytes hashed at a time, by each thread.
STEP_BYTES = 8 << 20

#: Tensors hashed at the same time; one thread does about 1 GB/s.
MOST_THREADS = 4

#: Told the bytes that are hashed, and how many there are.
Hashed = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or part `part` of `parts` equal ones along dimension `dim`. All dimensions before
    it have size 1, so the parts follow one another on the disk.
    """

    name: str
    part: int = 0
    parts: int = 0
    dim: int = 0


#: Piece by its name without the expert's number, for one expert.
Pieces = dict[str, Piece]


@dataclass(frozen=True, slots=True)
class Contents:
    """The pieces of a source.

    Attributes:
        source: whose.
        experts: block (`model.layers.3`) → expert → its pieces.
        rows: block → expert → its rows of the router.
        others: everything else, by name.
        layout: templates of the experts' tensors, to be compared.
        note: why no experts are told apart; empty where they are, or where there are none.
    """

    source: TensorSource
    experts: dict[str, dict[int, Pieces]] = field(default_factory=lambda: defaultdict(dict))
    rows: dict[str, dict[int, Pieces]] = field(default_factory=lambda: defaultdict(dict))
    others: Pieces = field(default_factory=dict)
    note: str = ""

    @property
    def layout(self) -> frozenset[str]:
        return frozenset(n for b in self.experts.values() for e in b.values() for n in e)

    def pieces(self) -> Iterator[Piece]:
        """All of them."""
        for table in (self.experts, self.rows):
            for experts in table.values():
                for found in experts.values():
                    yield from found.values()
        yield from self.others.values()

    def kind(self, piece: Piece) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a piece."""
        info = self.source.tensors[piece.name]
        if not piece.parts:
            return info.dtype, info.shape
        size = info.shape[piece.dim] // piece.parts
        return info.dtype, (size, *info.shape[piece.dim + 1 :])


def contents_of(source: TensorSource) -> Contents:
    """Sort a source's tensors by the experts that they belong to. Reads no weights."""
    form = find(source.config)
    if form is None:
        family = source.config.get("model_type")
        others = {name: Piece(name) for name in source.tensors}
        return Contents(source, others=others, note=f"{family!r} is no known family")
    if not form.is_moe:
        return Contents(source, others={name: Piece(name) for name in source.tensors})
    form = layout_of(form, source.tensors)
    try:
        count, roles = form.moe(source.config).num_experts, Roles(form)
    except CheckpointError as error:
        others = {name: Piece(name) for name in source.tensors}
        return Contents(source, others=others, note=error.message)
    found = Contents(source)
    for name in source.tensors:
        _sort(found, name, roles.of(name), count)
    for block in found.rows.keys() - found.experts.keys():  # rows of nobody
        found.others.update((p.name, Piece(p.name)) for p in found.rows.pop(block)[0].values())
    return found


def _sort(found: Contents, name: str, role: Role | None, count: int) -> None:
    """Put a tensor where it belongs."""
    info = found.source.tensors[name]
    if role is not None and role.kind == "expert":
        key = f"{role.stem}*{role.rest}".removeprefix(role.block)
        found.experts[role.block].setdefault(role.expert, {})[key] = Piece(name)
        return
    if role is not None and count:
        key = name.removeprefix(role.block)
        if role.kind == "stacked" and info.shape and not info.shape[0] % count:
            for e in range(count):
                found.experts[role.block].setdefault(e, {})[key] = Piece(name, e, count)
            return
        line, rows = role.router, _rows(role, info.shape)
        if line is not None and rows >= count:
            for e in range(count):
                found.rows[role.block].setdefault(e, {})[key] = Piece(name, e, rows, line.dim)
            for e in range(count, rows):  # rows of no FFN
                found.others[f"{name}[{e}]"] = Piece(name, e, rows, line.dim)
            return
    found.others[name] = Piece(name)


def _rows(role: Role, shape: Sequence[int]) -> int:
    """Rows of a router's tensor that stand for an expert each; 0 where none do."""
    line = role.router
    if line is None or line.kind in ("other", "table") or len(shape) <= line.dim:
        return 0
    return shape[line.dim] if prod(shape[: line.dim]) == 1 else 0


def hash_pieces(
    sides: Sequence[Contents], workers: int | None = None, progress: Hashed | None = None
) -> list[Mapping[Piece, str]]:
    """SHA-256 of every piece of every side.

    Args:
        sides: what to hash.
        workers: threads that read files; by default as many as there are processors, up to four.
            Values that must be computed first are computed one tensor at a time.
        progress: told after every step.

    Raises:
        CheckpointError: a file cannot be read.
    """
    jobs: dict[Any, tuple[TensorSource, str, int]] = {}
    wanted: list[dict[tuple[str, int], Any]] = []
    for i, side in enumerate(sides):
        keys: dict[tuple[str, int], Any] = {}
        for name, parts in dict.fromkeys((p.name, p.parts) for p in side.pieces()):
            place = side.source.extents(name)
            keys[name, parts] = key = (i, name, parts) if place is None else (place, parts)
            jobs.setdefault(key, (side.source, name, parts))
        wanted.append(keys)
    count = _Count(sum(s.tensors[n].nbytes for s, n, _ in jobs.values()), progress)
    found: dict[Any, tuple[str, ...]] = {}
    read = {k: job for k, job in jobs.items() if k[0].__class__ is tuple}
    with ThreadPoolExecutor(workers or min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        hashed = pool.map(lambda job: _hash(job, count), read.values())
        found |= zip(read, hashed, strict=True)
    found |= {k: _hash(job, count) for k, job in jobs.items() if k not in read}
    return [
        {p: found[keys[p.name, p.parts]][p.part] for p in side.pieces()}
        for side, keys in zip(sides, wanted, strict=True)
    ]


class _Count:
    """Bytes that are done, told from any thread."""

    def __init__(self, total: int, progress: Hashed | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _hash(job: tuple[TensorSource, str, int], count: _Count) -> tuple[str, ...]:
    """Of each part of a tensor."""
    source, name, parts = job
    place = source.extents(name)
    pieces = _computed(source, name) if place is None else _stored(place)
    return tuple(_digests(pieces, source.tensors[name].nbytes // max(parts, 1), parts, count))


def _digests(pieces: Iterable[memoryview], size: int, parts: int, count: _Count) -> Iterator[str]:
    """Hex SHA-256 of every `size` bytes of a stream."""
    if size == 0:
        yield from (hashlib.sha256().hexdigest() for _ in range(max(parts, 1)))
        return
    digest, missing = hashlib.sha256(), size
    for piece in pieces:
        count.add(len(piece))
        while len(piece) >= missing:
            digest.update(piece[:missing])
            yield digest.hexdigest()
            piece = piece[missing:]
            digest, missing = hashlib.sha256(), size
        digest.update(piece)
        missing -= len(piece)


def _stored(place: tuple[Extent, ...]) -> Iterator[memoryview]:
    for extent in place:
        for piece in read_pieces(extent, STEP_BYTES):
            yield memoryview(piece)


def _computed(source: TensorSource, name: str) -> Iterator[memoryview]:
    import torch

    for piece in source.stream(name):
        yield piece.contiguous().flatten().view(torch.uint8).numpy().data
