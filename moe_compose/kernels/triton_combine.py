# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""What follows the products: the weighted sum per token, and the saliency sums per expert.

Both in a fixed order, whatever the device does first.

Shape suffixes: T tokens, K top-k, P pairs = T·K, D model, E experts, N column tiles of `down`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_products import round_bf16


@triton.jit
def combine(
    y_PD,
    gates_P,
    slot_of_P,
    out_TD,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    ROUND: tl.constexpr,
    BD: tl.constexpr,
):
    """`Σ_j g_tj · y_tj` in fp32, in the order of j."""
    columns: tl.constexpr = (D + BD - 1) // BD
    token = tl.program_id(0) // columns
    d = tl.program_id(0) % columns * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for j in range(TOP_K):
        slot = tl.load(slot_of_P + token * TOP_K + j)
        gate = tl.load(gates_P + token * TOP_K + j)
        there = d < tl.where(slot >= 0, D, 0)
        y = tl.load(y_PD + slot.to(tl.int64) * D + d, mask=there, other=0.0).to(tl.float32)
        total += tl.where(slot >= 0, gate, 0.0) * y
    if ROUND:
        total = round_bf16(total)
    out_ptrs = out_TD + token.to(tl.int64) * D + d
    tl.store(out_ptrs, total.to(out_TD.dtype.element_ty), mask=d < D)


@triton.jit
def add_saliency(
    squares_NP,
    gates_P,
    pair_of_P,
    starts_E,
    totals_E,
    table_6E,
    pairs,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BP: tl.constexpr,
):
    """One program per expert adds its pairs' sums, in fp64, to its column of the table."""
    e = tl.program_id(0)
    row = tl.load(starts_E + e)
    count = tl.load(totals_E + e)
    end = row + count
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
        row += BP
    table = table_6E + e
    tl.store(table, tl.load(table) + count)
    tl.store(table + E, tl.load(table + E) + tl.sum(gate_sum, 0))
    tl.store(table + 2 * E, tl.load(table + 2 * E) + tl.sum(norm_sum, 0))
    tl.store(table + 3 * E, tl.load(table + 3 * E) + tl.sum(square_sum, 0))
    tl.store(table + 4 * E, tl.load(table + 4 * E) + tl.sum(gated_sum, 0))
    tl.store(table + 5 * E, tl.maximum(tl.load(table + 5 * E), tl.max(largest, 0)))
