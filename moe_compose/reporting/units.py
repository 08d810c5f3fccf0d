"""Numbers for people."""

from __future__ import annotations

import re

from moe_compose.checkpoint.write_checks import human

__all__ = ["bytes_text", "count", "parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def count(number: int) -> str:
    """Parameters in the way model names say them: `950`, `12.3 K`, `1.05 M`, `12.9 B`.

    >>> count(1_050_000)
    '1.05 M'
    """
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            value = number / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return str(number)


def bytes_text(nbytes: int) -> str:
    """Bytes in binary units: `640 B`, `4.7 GiB`."""
    return f"{nbytes} B" if nbytes < 1024 else human(nbytes)


def parse_bytes(size: str | int) -> int:
    """`5GB`, `500MB` or a plain number of bytes; units are decimal, as shard sizes are everywhere.

    Raises:
        ValueError: it is no size; what it must be, in words.

    >>> parse_bytes("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(size).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if found < 1:
        raise ValueError("a size in bytes, such as 5GB, 500MB or 4000000")
    return found
