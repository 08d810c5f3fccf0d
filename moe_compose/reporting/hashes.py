"""SHA-256 of the files of weights that a plan starts from: taken while its result is written, kept
in the result's record.

A plan's digest covers names, dtypes and shapes, as planning reads no weights. What the weights
themselves were is said by these hashes: `sources: [{label, digest, files: {name: sha256}}]`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.reporting.front_matter import leaves
from moe_compose.surgery.plan import Plan

#: Bytes hashed between two looks at whether to go on.
STEP_BYTES = 8 << 20

#: Files hashed at the same time; one thread does about 1 GB/s.
MOST_THREADS = 4

log = logging.getLogger("moe_compose")


class Hashing:
    """Hashes files in threads of its own, a file each at a time; hashlib leaves the interpreter to
    others meanwhile.

    A context: at its end the threads are gone, whether they were done or not.

    Args:
        files: what to hash. A file in the Hub's cache is named by its hash, so it is not read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(files)
        self._found: dict[Path, str] = {}
        self._stop = threading.Event()
        self._left, self._lock = iter(self._files), threading.Lock()
        count = min(MOST_THREADS, os.cpu_count() or 1, len(self._files))
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Hashing:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._join()

    def result(self) -> Mapping[Path, str]:
        """File → hex SHA-256, when all is done; without the files that could not be read."""
        self._join()
        return self._found

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _next(self) -> Path | None:
        with self._lock:
            return next(self._left, None)

    def _run(self) -> None:
        while (path := self._next()) is not None:
            try:
                digest = _blob_name(path) or self._digest(path)
            except OSError as error:
                log.warning("no SHA-256 of %s is recorded (%s)", path.name, error.strerror)
                continue
            if digest is None:
                return
            self._found[path] = digest

    def _digest(self, path: Path) -> str | None:
        """Of one file; None if there was no time for all of it."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(STEP_BYTES))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if self._stop.is_set():
                    return None
                digest.update(buffer[:count])
        return digest.hexdigest()


def hashed_files(source: TensorSource) -> list[Path]:
    """Every file of weights that a plan starts from, through plans of plans; none for others."""
    if not isinstance(source, Plan):
        return []
    found = (leaf.weight_files for leaf in leaves(source) if isinstance(leaf, Checkpoint))
    return list(dict.fromkeys(path for paths in found for path in paths))


def by_name(plan: Plan, hashes: Mapping[Path, str]) -> dict[str, str]:
    """The hashes under the names that a card shows: with the checkpoint's label, if there are
    several.
    """
    checkpoints = [leaf for leaf in leaves(plan) if isinstance(leaf, Checkpoint)]
    many = len(checkpoints) > 1
    return {
        f"{c.label}/{path.name}" if many else path.name: hashes[path]
        for c in checkpoints
        for path in c.weight_files
        if path in hashes
    }


def recorded(history: Sequence[Mapping[str, Any]], plan: Plan) -> dict[Path, str]:
    """The hashes that a result's history holds of the files a plan starts from."""
    found: dict[Path, str] = {}
    for entry, source in _entries(history, plan):
        files = entry.get("files")
        known = files if isinstance(files, dict) else {}
        found |= {p: str(known[p.name]) for p in source.weight_files if p.name in known}
    return found


def record(history: Sequence[Mapping[str, Any]], plan: Plan, hashes: Mapping[Path, str]) -> None:
    """Write hashes into the history of a plan's result, in place."""
    for entry, source in _entries(history, plan):
        entry["files"] = {p.name: hashes[p] for p in source.weight_files if p in hashes}


def _entries(
    history: Sequence[Mapping[str, Any]], plan: Plan
) -> Iterator[tuple[dict[str, Any], Checkpoint]]:
    """The checkpoints that a plan starts from, each with its entry in the history."""
    own = [r.get("sources") for r in history if r.get("plan_digest") == plan.digest()]
    known = own[-1] if own and isinstance(own[-1], list) else []
    for entry, source in zip(known, plan.sources.values(), strict=False):
        if isinstance(source, Checkpoint) and isinstance(entry, dict):
            yield entry, source
    for source in plan.sources.values():
        if isinstance(source, Plan):
            yield from _entries(history, source)


def _blob_name(path: Path) -> str | None:
    """The SHA-256 of a file in the Hub's cache."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and len(blob.name) == 64 else None
