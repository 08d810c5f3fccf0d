"""Can the receipt be had here? One layer at a time is in memory, and logits wait on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

#: What running takes beyond weights: activations, and the program itself.
_BESIDES = 1 << 29


class ShortageError(Exception):
    """Too little memory or disk; says of what, and how much."""


def require(weights: int, logits: int) -> None:
    """Refuse a run that this machine cannot hold.

    Args:
        weights: bytes of weights in memory at once.
        logits: bytes of all logits of one run; up to four wait on disk.

    Raises:
        ShortageError: there is not enough.
    """
    needed, available = weights + _BESIDES, memory_available()
    if available is not None and needed > available:
        raise ShortageError(
            f"a layer at a time takes about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free"
        )
    needed, free = 4 * logits, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise ShortageError(
            f"logits take {needed / 2**30:.1f} GiB in the folder for temporary files, "
            f"{free / 2**30:.1f} GiB are free"
        )


def memory_available() -> int | None:
    """Bytes of memory that can be had without swapping, a container's limit included; None where
    the system does not tell.
    """
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        if (group / "memory.max").exists() and (group / "memory.max").read_text().strip() != "max":
            limit = int((group / "memory.max").read_text())
            found.append(limit - int((group / "memory.current").read_text()))
        if not found:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return None
    return min(found)
