# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Sort (token, expert) pairs by expert and cut each expert's rows into tiles: four launches.

A stable counting sort without atomics, so the order of rows, and with it every sum, is the same in
every run; and without asking the device for a count, so a CUDA graph can hold it. The lists are as
long as they could get; what is left over says −1.

    histogram   how many pairs of each expert in each tile of pairs
    scan        per expert: how many in earlier tiles, and in all
    schedule    which expert and which rows each program of the products takes
    scatter     the slot (place in the order) of every pair, and the pair of every slot

Ids outside 0..E-1 fall out in the histogram and get slot −1.

Shape suffixes: P pairs = T·K, E experts, L tiles of pairs, B tiles of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def histogram(ids_P, counts_LE, pairs, E: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr):
    tile = tl.program_id(0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    p = tile * BP + tl.arange(0, BP)
    ids = tl.load(ids_P + p, mask=p < pairs, other=-1).to(tl.int32)
    counts = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts_LE + tile * E + e, counts, mask=e < E)


@triton.jit
def scan(counts_LE, before_LE, totals_E, tiles, E: tl.constexpr, BL: tl.constexpr):
    e = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    while start < tiles:
        tile = start + tl.arange(0, BL)
        counts = tl.load(counts_LE + tile * E + e, mask=tile < tiles, other=0)
        tl.store(before_LE + tile * E + e, total + tl.cumsum(counts, 0) - counts, mask=tile < tiles)
        total += tl.sum(counts, 0)
        start += BL
    tl.store(totals_E + e, total)


@triton.jit
def schedule(
    totals_E,
    starts_E,
    expert_B,
    row_B,
    end_B,
    blocks,
    ROWS: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BB: tl.constexpr,
):
    e = tl.arange(0, E_PADDED)
    totals = tl.load(totals_E + e, mask=e < E, other=0)
    ends = tl.cumsum(totals, 0)
    starts = ends - totals
    tiles = (totals + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(tiles, 0)
    first_row = starts - (tile_ends - tiles) * ROWS  # of the expert's tile, less that of tile 0
    if tl.program_id(0) == 0:
        tl.store(starts_E + e, starts, mask=e < E)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    expert = tl.sum((tile_ends[None, :] <= b[:, None]).to(tl.int32), 1)
    mine = (e[None, :] == expert[:, None]).to(tl.int32)
    row = tl.sum(mine * first_row[None, :], 1) + b * ROWS
    end = tl.sum(mine * ends[None, :], 1)
    tl.store(expert_B + b, tl.where(expert < E, expert, -1), mask=b < blocks)
    tl.store(row_B + b, row, mask=b < blocks)
    tl.store(end_B + b, end, mask=b < blocks)


@triton.jit
def scatter(
    ids_P,
    before_LE,
    starts_E,
    pair_of_P,
    slot_of_P,
    pairs,
    E: tl.constexpr,
    BP: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tl.arange(0, BP)
    p = tile * BP + i
    ids = tl.load(ids_P + p, mask=p < pairs, other=-1).to(tl.int32)
    kept = (ids >= 0) & (ids < E)
    earlier = (ids[:, None] == ids[None, :]) & (i[None, :] < i[:, None])
    slot = tl.sum(earlier.to(tl.int32), 1)
    slot += tl.load(before_LE + tile * E + ids, mask=kept, other=0)
    slot += tl.load(starts_E + ids, mask=kept, other=0)
    tl.store(pair_of_P + slot, p, mask=kept)
    tl.store(slot_of_P + p, tl.where(kept, slot, -1), mask=p < pairs)
