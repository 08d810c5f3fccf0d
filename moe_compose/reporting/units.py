"""Numbers for people."""

from __future__ import annotations

from moe_compose.checkpoint.write_checks import human, parse_bytes

__all__ = ["bytes_text", "count", "parse_bytes"]


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
