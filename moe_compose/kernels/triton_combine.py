# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""What follows the products: the weighted sum per token, in a fixed order.

Shape suffixes: T tokens, K top-k, P pairs = T·K, D model.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_pieces import round_bf16


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
