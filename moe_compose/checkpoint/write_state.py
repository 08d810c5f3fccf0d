"""The note that a write leaves in its folder while it is under way, and the lock on it.

The file is there from before the first byte until after the last: so a folder that holds it is
unfinished, whoever finds it knows what was being written and from what, and a write that continues
can tell whether it still is the same.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from moe_compose.checkpoint.copying import os_errors, part_of, sync_folder, write_at
from moe_compose.errors import WriteError

STATE_NAME = ".moe-compose-write.json"

log = logging.getLogger("moe_compose")


@dataclass(frozen=True, slots=True)
class WriteState:
    """What is being written, and from what.

    Attributes:
        digest: of the plan.
        shards: name and size in bytes of every file of weights.
        sources: name, size in bytes and time of last change (ns) of every file that bytes are
            copied from, in order of first use.
        removing: the files of an older checkpoint are being removed; nothing found next to this
            state is worth keeping.
    """

    digest: str
    shards: tuple[tuple[str, int], ...]
    sources: tuple[tuple[str, int, int], ...]
    removing: bool = False


def read_state(folder: Path) -> WriteState | None:
    """The state in a folder; None where there is none, or its writer died before it said any."""
    try:
        content = json.loads((folder / STATE_NAME).read_bytes())
        return WriteState(
            digest=str(content["digest"]),
            shards=tuple((str(name), int(size)) for name, size in content["shards"]),
            sources=tuple((str(n), int(size), int(ns)) for n, size, ns in content["sources"]),
            removing=bool(content["removing"]),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WriteError(f"cannot read {folder / STATE_NAME} ({error.strerror})") from error
    except (ValueError, TypeError, KeyError):
        return None


class StateFile:
    """The state file of a folder, locked against other writers for as long as it is open.

    A new state replaces the old one by renaming, with the new file locked before it takes the name:
    at no time is there a file under the name that another writer could lock.

    Raises:
        WriteError: another process holds the lock, or the folder is not writable.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATE_NAME
        with os_errors(f"write {self._path}"):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._descriptor, folder)
            self._refuse_if_replaced(folder)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def record(self, state: WriteState) -> None:
        """Put a new state in the place of the old one."""
        part = part_of(self._path)
        with os_errors(f"write {self._path}"):
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _lock(descriptor, self._path.parent)
                write_at(descriptor, memoryview(json.dumps(asdict(state)).encode()), 0)
                os.fsync(descriptor)
                os.replace(part, self._path)
                sync_folder(self._path.parent)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(self._descriptor)
            self._descriptor = descriptor

    def remove(self) -> None:
        """Take the file away: the write is finished, or never began."""
        with os_errors(f"remove {self._path}"):
            self._path.unlink()
            sync_folder(self._path.parent)

    def discard_if_empty(self) -> None:
        """Take the file away if nothing was ever recorded in it."""
        if os.fstat(self._descriptor).st_size == 0:
            self.remove()

    def _refuse_if_replaced(self, folder: Path) -> None:
        """Another writer may have finished, and removed the file, between our opening and our
        locking it.
        """
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            raise _busy(folder) from None
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise _busy(folder)


def refuse_if_locked(folder: Path) -> None:
    """Raise if another process is writing into the folder now; changes nothing.

    Raises:
        WriteError: so it is.
    """
    try:
        descriptor = os.open(folder / STATE_NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not a POSIX system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _busy(folder) from None
        log.info("no lock on %s (%s): take care that only one write runs there", folder, error)


def _busy(folder: Path) -> WriteError:
    return WriteError(
        f"another process is writing to {folder}/",
        hint="Wait until it has finished, or give another folder.",
    )
