"""Weights in memory that the system gets back at once when they are freed.

An allocator keeps what it once had, in pieces too small for the next layer: without this, a layer
that was freed is still resident.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Smaller tensors are left to the allocator.
_SMALL = 64 << 10


def own_pages(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype` on pages of its own, unmapped with its last reference.

    Its start is aligned as torch aligns its own: products may depend on that in the last bit.
    """
    size = tensor.numel() * dtype.itemsize
    if size < _SMALL:
        return tensor.to(dtype, copy=True)
    pages = mmap.mmap(-1, size)
    return torch.frombuffer(pages, dtype=dtype).view(tensor.shape).copy_(tensor)


@cache
def _malloc_trim() -> Any:
    """glibc's `malloc_trim`; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def trim() -> None:
    """Return freed memory of the process to the system.

    Threads allocate from arenas of their own, and glibc keeps what it once had there.
    """
    found = _malloc_trim()
    if found is not None:
        found(0)


def give_back(device: torch.device) -> None:
    """Return freed memory of the process, and of the device, to the system."""
    trim()
    if device.type == "cuda":
        torch.cuda.empty_cache()
