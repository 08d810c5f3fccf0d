"""Which tokens are the sample that similarities are gathered on."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moe_compose.calibration.tokens import Rows

#: Sequence, its tokens, its batch, and where it begins among the batch's flattened positions.
_Row = tuple[int, int, int, int]


def sample_of(rows: Sequence[Rows], size: int, seed: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Draw tokens, spread evenly over the domains; the same ones however they are batched.

    Args:
        rows: the batches.
        size: tokens of the sample, at most all there are; 0: none.
        seed: of the draw.

    Returns:
        Batch → (its places among the flattened positions, their places in the sample), int64.
    """
    if not size:
        return {}
    by_domain = _by_domain(rows)
    lengths = [sum(row[1] for row in found) for found in by_domain]
    taken: dict[int, tuple[list[int], list[int]]] = {}
    slot = 0
    for domain, (found, wanted) in enumerate(zip(by_domain, _shares(lengths, size), strict=True)):
        generator = random.Random(f"sample {seed} {domain}")
        ends = list(accumulate(row[1] for row in found))
        for token in sorted(generator.sample(range(lengths[domain]), wanted)):
            at = bisect_right(ends, token)
            _, length, batch, begin = found[at]
            places, slots = taken.setdefault(batch, ([], []))
            places.append(begin + token - (ends[at] - length))
            slots.append(slot)
            slot += 1
    return {b: (torch.tensor(places), torch.tensor(slots)) for b, (places, slots) in taken.items()}


def _by_domain(rows: Sequence[Rows]) -> list[list[_Row]]:
    """The sequences of each domain, in their order before they were batched."""
    found: dict[int, list[_Row]] = {}
    for batch, row in enumerate(rows):
        width = row.batch.ids.shape[1]
        each = zip(
            row.domain_B.tolist(), row.sequence_B.tolist(), row.real.sum(-1).tolist(), strict=True
        )
        for b, (domain, sequence, length) in enumerate(each):
            found.setdefault(domain, []).append((sequence, length, batch, b * width))
    return [sorted(found[domain]) for domain in sorted(found)]


def _shares(lengths: Sequence[int], size: int) -> list[int]:
    """How many of each, as even as there are tokens for."""
    shares, left = [0] * len(lengths), min(size, sum(lengths))
    while left:
        room = [d for d, n in enumerate(lengths) if shares[d] < n]
        for d in room:
            more = min(max(1, left // len(room)), lengths[d] - shares[d], left)
            shares[d] += more
            left -= more
    return shares
