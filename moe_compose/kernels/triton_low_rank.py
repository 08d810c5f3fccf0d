# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The narrow half of a low-rank addition: rows times a matrix of few outputs per expert.

LoRA adds s·B A x to W x. `project` makes s·A x, `[P, R]`; the products then add B times it in
registers. The backward needs s·Bᵀ of a gradient, which is the same kernel with other strides.

Shape suffixes: T tokens, P pairs = T·K, B tiles of rows, C columns of the input, E experts, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_pieces import round_bf16


@triton.jit
def project(
    x_PC,
    a_ERC,
    u_PR,
    pair_of_P,
    expert_B,
    row_B,
    end_B,
    scale,
    stride_x,
    stride_e,
    stride_r,
    stride_c,
    TOP_K: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    GATHER: tl.constexpr,
    ROUND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`scale · x aᵀ`; with `GATHER`, `x` has one row per token instead of one per slot."""
    COLUMNS: tl.constexpr = (R + BN - 1) // BN
    tile = tl.program_id(0) // COLUMNS
    expert = tl.load(expert_B + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(end_B + tile)
    row = tl.load(row_B + tile) + tl.arange(0, BM)
    ours = row < end
    source = tl.minimum(row, end - 1)
    if GATHER:
        source = tl.load(pair_of_P + source) // TOP_K
    r = tl.program_id(0) % COLUMNS * BN + tl.arange(0, BN)
    c = tl.arange(0, BK)
    x_ptrs = x_PC + source[:, None].to(tl.int64) * stride_x + c[None, :]
    a_ptrs = a_ERC + expert * stride_e + r[None, :] * stride_r + c[:, None] * stride_c
    u = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        if C % BK == 0:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=c[None, :] < C - start, other=0.0)
        inside = (c[:, None] < C - start) & (r[None, :] < R)
        a = tl.load(a_ptrs, mask=inside, other=0.0)
        u = tl.dot(x, a, u, input_precision="ieee")
        x_ptrs += BK
        a_ptrs += BK * stride_c
    u = u * scale
    if ROUND:
        u = round_bf16(u)
    u_ptrs = u_PR + row[:, None].to(tl.int64) * R + r[None, :]
    tl.store(u_ptrs, u.to(u_PR.dtype.element_ty), mask=ours[:, None] & (r[None, :] < R))
