"""Moving bytes between files: positioned, interruptible, and atomic for whoever looks on.

Where the kernel can move bytes from file to file (`copy_file_range`), they never pass through this
process: on file systems that share blocks nothing is copied at all, on others it is one pass
    through the page cache. Where it cannot (other disk, other file
system, no such call) a bounded buffer does the same.

A file appears under its final name only when all of it is on the disk: it is written as
`NAME.part`, flushed, then renamed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moe_compose.errors import CheckpointError, WriteError

#: Bytes moved between two looks at whether to go on.
SLICE_BYTES = 64 << 20
#: Bytes held in memory where the kernel cannot copy by itself.
BUFFER_BYTES = 4 << 20

PART_SUFFIX = ".part"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that lie together in a source file and will lie together in the output: from
    `source_offset` to `offset`.
    """

    path: Path
    source_offset: int
    offset: int
    nbytes: int

    def joins(self, following: Run) -> bool:
        """Whether the following run goes on where this one ends, in both files."""
        return (
            self.path == following.path
            and self.source_offset + self.nbytes == following.source_offset
            and self.offset + self.nbytes == following.offset
        )


@contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn any OSError inside into a WriteError that says what was being done, such as "write
    out/config.json".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and os.fsdecode(error.filename) not in action:
            reason += f": {os.fsdecode(error.filename)}"
        hint = ""
        if error.errno in FULL_DISK:
            hint = "Finished shards are kept: --resume continues after freeing space."
        raise WriteError(f"cannot {action} ({reason})", hint=hint) from error


def copy_run(run: Run, target: int, tick: Callable[[int], None]) -> None:
    """Copy a run of bytes into an open file.

    Args:
        run: what to copy, and to where.
        target: file descriptor of the output.
        tick: told the bytes moved after every slice; may raise in order to stop.

    Raises:
        CheckpointError: the source ends before the run does, or cannot be read.
        OSError: the output cannot be written.
    """
    with _open_source(run.path) as source:
        moved = 0
        while moved < run.nbytes:
            size = min(SLICE_BYTES, run.nbytes - moved)
            count = _copy_slice(source, run, moved, target, size)
            moved += count
            tick(count)


def _copy_slice(source: int, run: Run, moved: int, target: int, size: int) -> int:
    """Copy up to `size` bytes from `moved` bytes into the run; how many were.

    Any failure of `copy_file_range` but a full disk is handed to the plain loop, which either
    succeeds or fails on the side that is to blame. So is a count of 0: it should mean the end of
    the source, and some file systems say it without cause.
    """
    start, position = run.source_offset + moved, run.offset + moved
    if hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, size, start, position)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            count = 0
        if count:
            return count
    try:
        data = os.pread(source, min(size, BUFFER_BYTES), start)
    except OSError as error:
        raise CheckpointError(f"cannot read {run.path} ({error.strerror})") from error
    if not data:
        raise CheckpointError(
            f"{run.path} is shorter than its header says: it ends before byte {start + size}",
            hint="Fetch the file again.",
        )
    return write_at(target, memoryview(data), position)


@contextmanager
def _open_source(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(target: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at a position of an open file; returns its size in bytes."""
    written = 0
    while written < len(data):
        written += os.pwrite(target, data[written:], offset + written)
    return len(data)


def create_part(path: Path) -> int:
    """Open `path.part` for writing, new and empty; what was there under that name is removed
    first.
    """
    part = part_of(path)
    part.unlink(missing_ok=True)
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def commit_part(path: Path, descriptor: int) -> None:
    """Flush an open `path.part` to the disk, close it, and give it its final name; on failure it is
    removed.
    """
    try:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part_of(path), path)
    except BaseException:
        discard_part(path)
        raise
    sync_folder(path.parent)


def discard_part(path: Path) -> None:
    """Remove `path.part` if it is there and can be removed."""
    with suppress(OSError):
        part_of(path).unlink()


def part_of(path: Path) -> Path:
    return path.with_name(path.name + PART_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | Path) -> None:
    """Write a small file in one step: whoever looks sees the old file or the whole new one.

    Args:
        path: where; its folder is created.
        content: the bytes, or a file to take them from.

    Raises:
        CheckpointError: the file to take them from cannot be read.
        WriteError: the file cannot be written.
    """
    with os_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = create_part(path)
        try:
            if isinstance(content, Path):
                _copy_whole(content, descriptor)
            else:
                write_at(descriptor, memoryview(content), 0)
        except BaseException:
            os.close(descriptor)
            discard_part(path)
            raise
        commit_part(path, descriptor)


def _copy_whole(source: Path, target: int) -> None:
    with _open_source(source) as descriptor:
        size = os.fstat(descriptor).st_size
    copy_run(Run(source, 0, 0, size), target, lambda count: None)
