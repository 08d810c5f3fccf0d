"""Which expert of one checkpoint is which of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

#: All that identifies an expert's tensors: name without its number, dtype, shape, SHA-256.
Identity = tuple[tuple[str, str, tuple[int, ...], str], ...]


def match(
    a: Mapping[int, Identity],
    b: Mapping[int, Identity],
    rows_a: Mapping[int, Identity],
    rows_b: Mapping[int, Identity],
) -> dict[int, int]:
    """Expert of the second → expert of the first that it is or was: one of the same bytes, at the
    same index where it can be; else one with the same rows of the router, where these tell; else,
    where both have as many experts, the one of the same index. No expert is given twice, unless it
    was copied.
    """
    found = {e: e for e in b if a.get(e) == b[e]}
    for e in (e for e in sorted(b) if e not in found):
        like = [i for i in sorted(a) if a[i] == b[e]]
        free = [i for i in like if i not in found.values()]
        if like:
            found[e] = (free or like)[0]
    times_a, times_b = Counter(rows_a.values()), Counter(rows_b.values())
    home = {row: i for i, row in rows_a.items() if i in a and times_a[row] == 1}
    for e in (e for e in sorted(b) if e not in found and e in rows_b):
        i = home.get(rows_b[e])
        if i is not None and times_b[rows_b[e]] == 1 and i not in found.values():
            found[e] = i
    if len(a) == len(b):
        taken = set(found.values())
        found |= {e: e for e in b if e not in found and e in a and e not in taken}
    return found
