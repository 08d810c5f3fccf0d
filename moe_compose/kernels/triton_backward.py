# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The backward of the experts up to dz and d(g): what the forward's kernels don't already do.

With dO the gradient of a token's output, g the router's weight, and h, z as in `layout.py`:

    hidden_gradient   dh' = W_2ᵀ dO;  d(g) = dh'·h (+ dO·b_2);  dz = act'(z) · g · dh'
    gate_gradient     d(g) of every (token, slot), from the column tiles' parts

d(g) is taken from dh' instead of dO·y, so that y need not be kept. dX = W_1ᵀ dz is the forward's
`down` with other strides, then summed per token by its `combine`.

Shape suffixes: T tokens, P pairs = T·K, B tiles of rows, D model, F expert width, E experts, R
rank, N column tiles; the second P of z and dz is 2F if gated, F otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_pieces import (
    add_low_rank,
    derivative,
    load_z,
    nonlinear,
    round_bf16,
    store_z,
)
from moe_compose.kernels.triton_products import tile_of_program


@triton.jit
def piece(x, INDEX: tl.constexpr, PIECES: tl.constexpr):
    """Columns of a tile, where it lies in registers; `PIECES` is 1, 2 or 4."""
    if PIECES > 1:
        halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        if INDEX < PIECES // 2:
            x = piece(left, INDEX, PIECES // 2)
        else:
            x = piece(right, INDEX - PIECES // 2, PIECES // 2)
    return x


@triton.jit
def pointwise(
    dh,
    weight,
    z_PP,
    dz_PP,
    h_PF,
    row,
    ours,
    column,
    F: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    INPUT: tl.constexpr,
    ROUND: tl.constexpr,
    BN: tl.constexpr,
):
    """From dh' of one tile of columns: stores g·h and dz, returns the rows' dh'·h."""
    gate, up = load_z(z_PP, row, ours, column, F, GATED, INTERLEAVED, BN)
    gate_in = gate
    up_in = up
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if ACTIVATION == "clamped_swiglu":
        up += 1.0
    act = nonlinear(gate, ACTIVATION, ALPHA)
    h = act * up if GATED else act
    if HIDDEN:
        weighted = h * weight
        if ROUND:
            weighted = round_bf16(weighted)
        f = column * BN + tl.arange(0, BN)
        h_ptrs = h_PF + row[:, None].to(tl.int64) * F + f[None, :]
        there = ours[:, None] & (f[None, :] < F)
        tl.store(h_ptrs, weighted.to(h_PF.dtype.element_ty), mask=there)
    if INPUT:
        dz = dh * weight
        dgate = dz * derivative(gate, ACTIVATION, ALPHA)
        dup = dz * act
        if GATED:
            dgate = dgate * up
        if LIMIT is not None:  # at the limit the gradient passes, as torch.clamp's
            dgate = tl.where(gate_in <= LIMIT, dgate, 0.0)
            dup = tl.where((up_in >= -LIMIT) & (up_in <= LIMIT), dup, 0.0)
        store_z(dz_PP, dgate, dup, row, ours, column, F, GATED, INTERLEAVED, ROUND, BN)
    return tl.sum(dh * h, 1)


@triton.jit
def hidden_gradient(
    dout_TD,
    w_EDF,
    v_PR,
    a_ERF,
    z_PP,
    gates_P,
    dz_PP,
    h_PF,
    parts_NP,
    pair_of_P,
    expert_B,
    row_B,
    end_B,
    blocks,
    pairs,
    stride_e,
    stride_d,
    stride_f,
    lora_stride_e,
    lora_stride_f,
    lora_stride_r,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    GATES: tl.constexpr,
    HIDDEN: tl.constexpr,
    INPUT: tl.constexpr,
    ROUND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dh' stays in registers; stored are, as asked, its dot products with h (`GATES`, per column
    tile), g·h (`HIDDEN`) and dz (`INPUT`), which may take the place of z."""
    tile, column = tile_of_program(blocks, (F + BN - 1) // BN, GROUP)
    expert = tl.load(expert_B + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(row_B + tile) + tl.arange(0, BM)
    ours = row < tl.load(end_B + tile)
    pair = tl.load(pair_of_P + row, mask=ours, other=0)
    f = column * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    dout_ptrs = dout_TD + (pair // TOP_K)[:, None].to(tl.int64) * D + d[None, :]
    w_ptrs = w_EDF + expert * stride_e + f[None, :] * stride_f + d[:, None] * stride_d
    dh = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            dout = tl.load(dout_ptrs)
        else:
            dout = tl.load(dout_ptrs, mask=d[None, :] < D - start, other=0.0)
        if D % BK == 0 and F % BN == 0:
            w = tl.load(w_ptrs)
        else:
            inside = (d[:, None] < D - start) & (f[None, :] < F)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        dh = tl.dot(dout, w, dh, input_precision="ieee")
        dout_ptrs += BK
        w_ptrs += BK * stride_d
    if RANK > 0:
        a_ptrs = a_ERF + expert * lora_stride_e + f * lora_stride_f
        dh = add_low_rank(dh, v_PR, row, ours, a_ptrs, f < F, lora_stride_r, RANK, BR)
    weight = tl.load(gates_P + pair, mask=ours, other=0.0)[:, None]
    # In pieces, one after another: all at once, the registers don't suffice.
    PIECES: tl.constexpr = 1 if BN < 64 else BN // 32
    total = tl.zeros((BM,), tl.float32)
    for i in tl.static_range(PIECES):
        total += pointwise(
            piece(dh, i, PIECES),
            weight,
            z_PP,
            dz_PP,
            h_PF,
            row,
            ours,
            column * PIECES + i,
            F,
            GATED,
            INTERLEAVED,
            ACTIVATION,
            ALPHA,
            LIMIT,
            HIDDEN,
            INPUT,
            ROUND,
            BN // PIECES,
        )
    if GATES:  # columns past F are 0 in dh
        tl.store(parts_NP + column.to(tl.int64) * pairs + row, total, mask=ours)


@triton.jit
def gate_gradient(
    parts_NP,
    dout_TD,
    bias_ED,
    ids_P,
    slot_of_P,
    dgates_P,
    pairs,
    bias_stride_e,
    bias_stride_d,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum the column tiles' parts, and add dO·b_2; 0 for pairs without a slot."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    slot = tl.load(slot_of_P + p, mask=p < pairs, other=-1)
    there = slot >= 0
    total = tl.zeros((BP,), tl.float32)
    parts_ptrs = parts_NP + slot
    for _ in range(COLUMNS):
        total += tl.load(parts_ptrs, mask=there, other=0.0)
        parts_ptrs += pairs
    if BIAS:
        expert = tl.load(ids_P + p, mask=there, other=0).to(tl.int64)
        d = tl.arange(0, BD)
        dout_ptrs = dout_TD + (p // TOP_K)[:, None].to(tl.int64) * D + d[None, :]
        bias_ptrs = bias_ED + expert[:, None] * bias_stride_e + d[None, :] * bias_stride_d
        for start in range(0, D, BD):
            mask = there[:, None] & (d[None, :] < D - start)
            dout = tl.load(dout_ptrs + start, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptrs + start * bias_stride_d, mask=mask, other=0.0)
            total += tl.sum(dout * bias.to(tl.float32), 1)
    tl.store(dgates_P + p, total.to(dgates_P.dtype.element_ty), mask=p < pairs)
