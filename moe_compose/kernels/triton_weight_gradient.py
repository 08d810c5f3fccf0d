# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Gradients of the experts' matrices and biases: sums over each expert's rows.

    weight_gradient   Σ_p a_pᵀ b_p, of any matrix
    bias_gradient     Σ_p a_p

The router's weight g rides on h: dW_2 = Σ dO (g h)ᵀ, so that rows of dO are read as they are. No
atomics: each sum has one program, which takes it in slot order. One expert with most of the rows is
therefore slow: its sums are not cut. `PIPELINED` is off in the interpreter only: that of triton 3.6
cannot loop over a range whose ends were loaded.

Shape suffixes: T tokens, P pairs = T·K, E experts; M and N are the sides of the matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_pieces import round_bf16


@triton.jit
def add_rows(
    total,
    a_PM,
    b_PN,
    pair_of_P,
    stride_a,
    stride_b,
    start,
    end,
    m,
    n,
    TOP_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One step of `weight_gradient`."""
    row = start + tl.arange(0, BK)
    ours = row < end
    row_a = row
    row_b = row
    if GATHER_A or GATHER_B:
        token = tl.load(pair_of_P + row, mask=ours, other=0) // TOP_K
        if GATHER_A:
            row_a = token
        if GATHER_B:
            row_b = token
    a_ptrs = a_PM + row_a[:, None].to(tl.int64) * stride_a + m[None, :]
    b_ptrs = b_PN + row_b[:, None].to(tl.int64) * stride_b + n[None, :]
    if M % BM == 0:
        a = tl.load(a_ptrs, mask=ours[:, None], other=0.0)
    else:
        a = tl.load(a_ptrs, mask=ours[:, None] & (m[None, :] < M), other=0.0)
    if N % BN == 0:
        b = tl.load(b_ptrs, mask=ours[:, None], other=0.0)
    else:
        b = tl.load(b_ptrs, mask=ours[:, None] & (n[None, :] < N), other=0.0)
    return tl.dot(tl.trans(a), b, total, input_precision="ieee")


@triton.jit
def add_rows_of_bias(
    total,
    rows_PN,
    gates_P,
    pair_of_P,
    start,
    end,
    n,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    ROUTED: tl.constexpr,
    BK: tl.constexpr,
):
    """One step of `bias_gradient`."""
    row = start + tl.arange(0, BK)
    mask = (row < end)[:, None] & (n[None, :] < N)
    if ROUTED:
        pair = tl.load(pair_of_P + row, mask=row < end, other=0)
        weight = tl.load(gates_P + pair, mask=row < end, other=0.0)
        ptrs = rows_PN + (pair // TOP_K)[:, None].to(tl.int64) * N + n[None, :]
        added = weight[:, None] * tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        ptrs = rows_PN + row[:, None].to(tl.int64) * N + n[None, :]
        added = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return total + added


@triton.jit
def weight_gradient(
    a_PM,
    b_PN,
    out_EMN,
    pair_of_P,
    starts_E,
    totals_E,
    stride_a,
    stride_b,
    out_stride_e,
    out_stride_m,
    out_stride_n,
    TOP_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PIPELINED: tl.constexpr,
    ROUND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`Σ_p a_pᵀ b_p` over an expert's slots p; a gathered operand has one row per token.

    Every element of `out` is written: experts without rows get zeros.
    """
    TILES_M: tl.constexpr = (M + BM - 1) // BM
    TILES: tl.constexpr = TILES_M * ((N + BN - 1) // BN)
    expert = tl.program_id(0) // TILES
    within = tl.program_id(0) % TILES
    m = within % TILES_M * BM + tl.arange(0, BM)
    n = within // TILES_M * BN + tl.arange(0, BN)
    begin = tl.load(starts_E + expert)
    end = begin + tl.load(totals_E + expert)
    total = tl.zeros((BM, BN), tl.float32)
    if PIPELINED:
        for start in range(begin, end, BK):
            total = add_rows(
                total,
                a_PM,
                b_PN,
                pair_of_P,
                stride_a,
                stride_b,
                start,
                end,
                m,
                n,
                TOP_K,
                M,
                N,
                GATHER_A,
                GATHER_B,
                BM,
                BN,
                BK,
            )
    else:
        while begin < end:
            total = add_rows(
                total,
                a_PM,
                b_PN,
                pair_of_P,
                stride_a,
                stride_b,
                begin,
                end,
                m,
                n,
                TOP_K,
                M,
                N,
                GATHER_A,
                GATHER_B,
                BM,
                BN,
                BK,
            )
            begin += BK
    if ROUND:
        total = round_bf16(total)
    out_ptrs = out_EMN + expert.to(tl.int64) * out_stride_e
    out_ptrs += m[:, None].to(tl.int64) * out_stride_m + n[None, :].to(tl.int64) * out_stride_n
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out_ptrs, total.to(out_EMN.dtype.element_ty), mask=mask)


@triton.jit
def bias_gradient(
    rows_PN,
    gates_P,
    out_EN,
    pair_of_P,
    starts_E,
    totals_E,
    out_stride_e,
    out_stride_n,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    ROUTED: tl.constexpr,
    PIPELINED: tl.constexpr,
    ROUND: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Σ of an expert's rows; `ROUTED`: rows are tokens', and weighted by g."""
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    expert = tl.program_id(0) // COLUMNS
    n = tl.program_id(0) % COLUMNS * BN + tl.arange(0, BN)
    begin = tl.load(starts_E + expert)
    end = begin + tl.load(totals_E + expert)
    total = tl.zeros((BK, BN), tl.float32)
    if PIPELINED:
        for start in range(begin, end, BK):
            total = add_rows_of_bias(
                total, rows_PN, gates_P, pair_of_P, start, end, n, TOP_K, N, ROUTED, BK
            )
    else:
        while begin < end:
            total = add_rows_of_bias(
                total, rows_PN, gates_P, pair_of_P, begin, end, n, TOP_K, N, ROUTED, BK
            )
            begin += BK
    bias = tl.sum(total, 0)
    if ROUND:
        bias = round_bf16(bias)
    out_ptrs = out_EN + expert.to(tl.int64) * out_stride_e + n * out_stride_n
    tl.store(out_ptrs, bias.to(out_EN.dtype.element_ty), mask=n < N)
