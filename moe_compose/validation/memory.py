"""Can the receipt be had here? Its models are loaded whole, and its logits wait on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from moe_compose.checkpoint.reader import Checkpoint


def shortage(vocabulary: int, tokens: int, *checkpoints: Checkpoint) -> str | None:
    """What is missing for a comparison, in words; None when there is enough of everything.

    Args:
        vocabulary: columns of the logits.
        tokens: rows of the logits.
        checkpoints: the two that are loaded, one after the other.
    """
    needed, available = memory_needed(*checkpoints), memory_available()
    if available is not None and needed > available:
        return (
            f"comparing in fp32 takes about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free"
        )
    logits, free = 4 * 4 * vocabulary * tokens, shutil.disk_usage(tempfile.gettempdir()).free
    if logits > free:
        return (
            f"logits of {tokens} tokens take {logits / 2**30:.1f} GiB in the folder for temporary "
            f"files, {free / 2**30:.1f} GiB are free"
        )
    return None


def memory_needed(*checkpoints: Checkpoint) -> int:
    """Bytes that loading the larger of the checkpoints in fp32 takes, with a quarter on top for
    loading and running.
    """
    return max(5 * sum(t.numel for t in c.tensors.values()) for c in checkpoints)


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
