"""Filling shards by several threads at once, without waiting for the disk between them.

Each shard is cut into jobs: runs of bytes to copy, or one tensor to compute. Workers take jobs in
order and put the bytes where the layout says, so neither their number nor their speed shows in the
result. When the last job of a shard is done, one more thread flushes it and gives it its name,
while the workers are already at the next: the disk is busy writing one shard while another is being
read and computed. Should the disk fall behind, no further shard is opened.

As for memory, copied bytes do not pass through this process at all. A tensor that is computed is
counted as fp32, whatever it is stored in: at most `COMPUTED_BYTES` of such are under way at once,
and a larger one runs while no other does.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_compose.checkpoint.copying import (
    SLICE_BYTES,
    commit_part,
    copy_run,
    create_part,
    discard_part,
    os_errors,
    write_at,
)
from moe_compose.checkpoint.jobs import Job, OpenShard, jobs_of
from moe_compose.checkpoint.sharding import Placement, Shard
from moe_compose.checkpoint.source import TORCH_DTYPES, TensorInfo, TensorSource, torch_dtype
from moe_compose.errors import PlanError

if TYPE_CHECKING:
    import torch

#: Shards that wait to be flushed before workers stop to open new ones.
MAX_WAITING = 2
#: Bytes of tensors that are being computed at once, unless one alone is larger.
COMPUTED_BYTES = 384 << 20
#: Seconds between two reports of progress.
REPORT_SECONDS = 0.1


class _Stopped(Exception):  # noqa: N818 - not an error
    """Raised in a worker that is asked to end."""


class Pipeline:
    """Writes shards into a folder.

    Args:
        source: where the tensors come from; it must allow several threads to read at once.
        folder: where the shards go.
        shards: those to be written, in order.
        workers: threads that copy and compute.
        done: bytes of tensors that are there already, for `report`.
        report: called from the thread that calls `run`, with the bytes done and the name of a
            shard, about ten times a second.
    """

    def __init__(
        self,
        source: TensorSource,
        folder: Path,
        shards: Sequence[Shard],
        *,
        workers: int,
        done: int,
        report: Callable[[int, str], None],
    ) -> None:
        self._source = source
        self._folder = folder
        self._to_open = deque(shards)
        self._workers = workers
        self._report = report
        self._changed = threading.Condition()  # guards all below
        self._jobs: deque[Job] = deque()
        self._open: list[OpenShard] = []
        self._filled: deque[OpenShard] = deque()
        self._computing = 0  # bytes
        self._unfinished = len(shards)
        self._done = done
        self._current = shards[0].name if shards else ""
        self._stop = False
        self._error: BaseException | None = None
        self._over = threading.Event()

    def run(self) -> None:
        """Write all shards.

        Raises:
            MoeComposeError: what went wrong first; shards finished until then stay, begun ones are
                removed.
            KeyboardInterrupt: likewise.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        threads.append(threading.Thread(target=self._flush, daemon=True))
        try:
            self._report(self._done, self._current)
            for thread in threads:
                thread.start()
            while self._unfinished and not self._over.wait(REPORT_SECONDS):
                self._report(self._done, self._current)
            if self._error is not None:
                raise self._error
            self._report(self._done, self._current)
        finally:
            self._halt()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._discard_open()

    def _work(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                self._perform(job)
                self._job_done(job)
        except _Stopped:
            pass
        except BaseException as error:
            self._halt(error)

    def _flush(self) -> None:
        try:
            while (opened := self._next_filled()) is not None:
                with os_errors(f"write {opened.path}"):
                    self._finish(opened)
        except BaseException as error:
            self._halt(error)

    def _halt(self, error: BaseException | None = None) -> None:
        """End all threads at their next step; the first error is the one to report."""
        with self._changed:
            self._error = self._error or error
            self._stop = True
            self._over.set()
            self._changed.notify_all()

    def _next_job(self) -> Job | None:
        with self._changed:
            while not self._stop:
                if (job := self._take_job()) is not None:
                    return job
                if not self._jobs and not self._to_open:
                    return None
                if not self._jobs and len(self._filled) < MAX_WAITING:
                    self._open_next()
                else:
                    self._changed.wait()
            return None

    def _take_job(self) -> Job | None:
        """The first job that may begin. Copies overtake a tensor that waits for memory; other
        tensors do not, so that a large one gets its turn.
        """
        waits = False
        for i, job in enumerate(self._jobs):
            fits = not self._computing or self._computing + job.memory <= COMPUTED_BYTES
            if not job.memory or (fits and not waits):
                del self._jobs[i]
                self._computing += job.memory
                return job
            waits = True
        return None

    def _open_next(self) -> None:
        shard = self._to_open.popleft()
        path = self._folder / shard.name
        with os_errors(f"write {path}"):
            path.unlink(missing_ok=True)
            opened = OpenShard(shard, path, create_part(path))
            self._open.append(opened)
            write_at(opened.descriptor, memoryview(shard.header), 0)
            os.truncate(opened.descriptor, shard.size)
        jobs = list(jobs_of(self._source, opened))
        self._current = shard.name
        opened.pending = len(jobs)
        self._jobs.extend(jobs)
        if not jobs:
            self._filled.append(opened)
        self._changed.notify_all()

    def _perform(self, job: Job) -> None:
        target = job.target
        with target.copying, os_errors(f"write {target.path}"):
            for run in job.runs:
                copy_run(run, target.descriptor, self._tick)
        if job.computed is not None:
            with os_errors(f"read {job.computed.info.name}"):
                self._compute(job.computed, target)

    def _compute(self, placed: Placement, target: OpenShard) -> None:
        """Write a tensor's values where they belong, piece by piece, and nothing beyond them.

        Raises:
            PlanError: the values are not those that the header, already written, declares.
        """
        position, end = placed.offset, placed.offset + placed.info.nbytes
        for piece in self._source.stream(placed.info.name):
            size = piece.numel() * piece.element_size()
            if position + size > end:
                raise _wrong_size(placed.info, "more")
            with os_errors(f"write {target.path}"):
                self._put(_bytes_of(piece, placed.info), target.descriptor, position)
            position += size
            del piece  # before the next one is computed
        if position < end:
            raise _wrong_size(placed.info, f"only {position - placed.offset}")

    def _put(self, data: memoryview, descriptor: int, position: int) -> None:
        for start in range(0, len(data), SLICE_BYTES):
            part = data[start : start + SLICE_BYTES]
            self._tick(write_at(descriptor, part, position + start))

    def _tick(self, count: int) -> None:
        with self._changed:
            self._done += count
            if self._stop:
                raise _Stopped

    def _job_done(self, job: Job) -> None:
        with self._changed:
            self._computing -= job.memory
            job.target.pending -= 1
            if job.target.pending == 0:
                self._filled.append(job.target)
            if job.target.pending == 0 or job.memory:
                self._changed.notify_all()

    def _next_filled(self) -> OpenShard | None:
        """The next shard to flush; those that were filled before an error too."""
        with self._changed:
            while self._unfinished:
                if self._filled and (self._error is not None or not self._stop):
                    return self._filled[0]
                if self._stop:
                    return None
                self._changed.wait()
            return None

    def _finish(self, opened: OpenShard) -> None:
        """Flush a filled shard; it counts as waiting until that is done."""
        with self._changed:
            self._open.remove(opened)
        commit_part(opened.path, opened.descriptor)
        with self._changed:
            self._filled.popleft()
            self._unfinished -= 1
            if self._unfinished == 0:
                self._over.set()
            self._changed.notify_all()

    def _discard_open(self) -> None:
        """Remove what was begun and not finished: its bytes would be written again in any case."""
        for opened in self._open:
            os.close(opened.descriptor)
            discard_part(opened.path)


def _bytes_of(piece: torch.Tensor, info: TensorInfo) -> memoryview:
    import torch

    if info.dtype in TORCH_DTYPES and piece.dtype != torch_dtype(info.dtype):
        raise PlanError(f"{info.name} declares dtype {info.dtype} but gives {piece.dtype}")
    return piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _wrong_size(info: TensorInfo, given: str) -> PlanError:
    return PlanError(f"{info.name} declares {info.nbytes} bytes but gives {given}")
