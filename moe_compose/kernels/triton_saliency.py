# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The saliency sums per expert, in two steps and a fixed order, so that runs agree to the byte.

    partial_sums   each expert's rows are dealt, tile by tile, to a fixed number of programs
    add_sums       an expert's parts are added in order, and to its column of the table

An expert that has all rows is then as many programs' work as one that has its share.

Shape suffixes: P pairs = T·K, E experts, N column tiles of `down`, S shares of an expert's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partial_sums(
    squares_NP,
    gates_P,
    pair_of_P,
    starts_E,
    totals_E,
    parts_5SE,
    pairs,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
    BP: tl.constexpr,
):
    """Σg, Σ‖f‖, Σ‖f‖², Σg‖f‖ and max‖f‖ of one share of one expert's rows, in fp64."""
    e = tl.program_id(0) // SHARES
    share = tl.program_id(0) % SHARES
    start = tl.load(starts_E + e)
    end = start + tl.load(totals_E + e)
    row = start + share * BP
    gate_sum = tl.zeros((BP,), tl.float64)
    norm_sum = tl.zeros((BP,), tl.float64)
    square_sum = tl.zeros((BP,), tl.float64)
    gated_sum = tl.zeros((BP,), tl.float64)
    largest = tl.zeros((BP,), tl.float64)
    while row < end:
        slot = row + tl.arange(0, BP)
        ours = slot < end
        square = tl.zeros((BP,), tl.float64)
        square_ptrs = squares_NP + slot
        for _ in range(COLUMNS):
            square += tl.load(square_ptrs, mask=ours, other=0.0).to(tl.float64)
            square_ptrs += pairs
        pair = tl.load(pair_of_P + slot, mask=ours, other=0)
        gate = tl.load(gates_P + pair, mask=ours, other=0.0).to(tl.float64)
        norm = tl.sqrt(square)
        gate_sum += gate
        norm_sum += norm
        square_sum += square
        gated_sum += gate * norm
        largest = tl.maximum(largest, norm)
        row += SHARES * BP
    part = parts_5SE + share * E + e
    tl.store(part, tl.sum(gate_sum, 0))
    tl.store(part + SHARES * E, tl.sum(norm_sum, 0))
    tl.store(part + 2 * SHARES * E, tl.sum(square_sum, 0))
    tl.store(part + 3 * SHARES * E, tl.sum(gated_sum, 0))
    tl.store(part + 4 * SHARES * E, tl.max(largest, 0))


@triton.jit
def add_sums(
    parts_5SE, totals_E, table_6E, E: tl.constexpr, SHARES: tl.constexpr, BE: tl.constexpr
):
    """Program m adds measure m of `saliency.MEASURES`; the first is the count."""
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    measure = tl.program_id(0)
    table = table_6E + measure * E + e
    total = tl.load(table, mask=e < E, other=0.0)
    if measure == 0:
        total += tl.load(totals_E + e, mask=e < E, other=0)
    else:
        parts = parts_5SE + (measure - 1) * SHARES * E + e
        for share in range(SHARES):
            part = tl.load(parts + share * E, mask=e < E, other=0.0)
            total = tl.where(measure == 5, tl.maximum(total, part), total + part)
    tl.store(table, total, mask=e < E)
