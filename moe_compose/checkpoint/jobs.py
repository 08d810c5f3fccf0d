"""Cutting a shard into jobs: runs of bytes to copy, and tensors to compute."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_compose.checkpoint.copying import SLICE_BYTES, Run
from moe_compose.checkpoint.sharding import Placement, Shard
from moe_compose.checkpoint.source import TensorSource


@dataclass(slots=True, eq=False)
class OpenShard:
    """A shard under way: its file, and how many of its jobs are not done yet.

    Attributes:
        copying: held while bytes are copied into it. A file system lets one thread at a time write
            to a file, and others burn a core each while they wait for it.
    """

    shard: Shard
    path: Path
    descriptor: int
    pending: int = 0
    copying: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Job:
    """Work of a fair size: runs of bytes to copy, or else one tensor to compute."""

    target: OpenShard
    runs: list[Run] = field(default_factory=list)
    computed: Placement | None = None

    @property
    def memory(self) -> int:
        """Bytes that computing takes: 4 for each element. Copying takes none."""
        return 4 * self.computed.info.numel if self.computed else 0


def jobs_of(source: TensorSource, target: OpenShard) -> Iterator[Job]:
    """Cut a shard into jobs of at most about `SLICE_BYTES`, in the order of its bytes."""
    batch: list[Run] = []
    size = 0
    for item in _work_of(source, target.shard):
        if isinstance(item, Placement):
            yield Job(target, computed=item)
            continue
        for start in range(0, item.nbytes, SLICE_BYTES):
            count = min(SLICE_BYTES, item.nbytes - start)
            if batch and size + count > SLICE_BYTES:
                yield Job(target, batch)
                batch, size = [], 0
            batch.append(Run(item.path, item.source_offset + start, item.offset + start, count))
            size += count
    if batch:
        yield Job(target, batch)


def _work_of(source: TensorSource, shard: Shard) -> list[Run | Placement]:
    """Tensors to compute and bytes to copy; neighbours in both files become one run."""
    work: list[Run | Placement] = []
    for placed in shard.placements:
        extents = source.extents(placed.info.name)
        if extents is None:
            work.append(placed)
            continue
        offset = placed.offset
        for extent in extents:
            last = work[-1] if work else None
            run = Run(extent.path, extent.offset, offset, extent.nbytes)
            if isinstance(last, Run) and last.joins(run):
                work[-1] = replace(last, nbytes=last.nbytes + run.nbytes)
            else:
                work.append(run)
            offset += extent.nbytes
    return work
