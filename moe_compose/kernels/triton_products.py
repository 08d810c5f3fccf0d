# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The two matrix products of the experts, over the rows that `triton_sort` put in order.

`gate_up` gathers its rows by token and keeps z in registers: gate and up of the same columns are
in one program, which applies the activation and stores h. `down` stores the experts' outputs
unweighted, in slot order, and optionally each row's part of ‖f‖².

Every layout is strides: the gate of column f is at `f · stride_f`, its up `up_offset` further on.
Interleaved, the two are neighbours, and are read together.

Accumulators and activations are fp32; h and y are rounded once. With `ROUND`, values are rounded
to bf16 by hand and kept in fp32: that is how a bf16 layer runs in Triton's interpreter, whose bf16
is wrong.

Both take a low-rank addition: u_PR times a matrix of `RANK` columns per expert (LoRA). `gate_up`
can also store z, for the backward. `down` multiplies rows in slot order by any matrix per expert;
the backward uses it for the gradient of x.

Shape suffixes: P pairs = T·K, B tiles of rows, D model, F expert width, R rank; the P of W_1, b_1
and the second of z is 2F if gated, F otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_pieces import add_low_rank, nonlinear, round_bf16, store_z


@triton.jit
def tile_of_program(blocks, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Programs that run at the same time share rows of both operands."""
    width = GROUP * COLUMNS
    first = tl.program_id(0) // width * GROUP
    within = tl.program_id(0) % width
    size = min(blocks - first, GROUP)
    return first + within % size, within // size


@triton.jit
def gate_up(
    x_TD,
    w_EPD,
    bias_EP,
    u_PR,
    b_EPR,
    h_PF,
    z_PP,
    pair_of_P,
    expert_B,
    row_B,
    end_B,
    blocks,
    stride_t,
    stride_e,
    stride_f,
    stride_d,
    up_offset,
    bias_stride_f,
    bias_up_offset,
    bias_stride_e,
    lora_stride_e,
    lora_stride_f,
    lora_up_offset,
    lora_stride_r,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    SAVE_H: tl.constexpr,
    SAVE_Z: tl.constexpr,
    ROUND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, column = tile_of_program(blocks, (F + BN - 1) // BN, GROUP)
    expert = tl.load(expert_B + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(row_B + tile) + tl.arange(0, BM)
    ours = row < tl.load(end_B + tile)
    token = tl.load(pair_of_P + row, mask=ours, other=0) // TOP_K
    f = column * BN + tl.arange(0, BN)
    # Interleaved: both in one product, taken apart in registers.
    WIDE: tl.constexpr = BN * 2 if INTERLEAVED else BN
    C: tl.constexpr = F * 2 if INTERLEAVED else F
    c = column * WIDE + tl.arange(0, WIDE)
    stride_c = up_offset if INTERLEAVED else stride_f
    d = tl.arange(0, BK)
    x_ptrs = x_TD + token[:, None].to(tl.int64) * stride_t + d[None, :]
    w_ptrs = w_EPD + expert * stride_e + c[None, :] * stride_c + d[:, None] * stride_d
    z = tl.zeros((BM, WIDE), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=d[None, :] < D - start, other=0.0)
        inside = (d[:, None] < D - start) & (c[None, :] < C)
        if D % BK == 0 and F % BN == 0:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")
        if GATED and not INTERLEAVED:
            if D % BK == 0 and F % BN == 0:
                w = tl.load(w_ptrs + up_offset)
            else:
                w = tl.load(w_ptrs + up_offset, mask=inside, other=0.0)
            up = tl.dot(x, w, up, input_precision="ieee")
        x_ptrs += BK
        w_ptrs += BK * stride_d
    if RANK > 0:
        lora_stride_c = lora_up_offset if INTERLEAVED else lora_stride_f
        b_ptrs = b_EPR + expert * lora_stride_e + c * lora_stride_c
        z = add_low_rank(z, u_PR, row, ours, b_ptrs, c < C, lora_stride_r, RANK, BR)
        if GATED and not INTERLEAVED:
            b_ptrs += lora_up_offset
            up = add_low_rank(up, u_PR, row, ours, b_ptrs, c < C, lora_stride_r, RANK, BR)
    if BIAS:  # before they are taken apart: half the registers
        bias_stride_c = bias_up_offset if INTERLEAVED else bias_stride_f
        bias_ptrs = bias_EP + expert * bias_stride_e + c * bias_stride_c
        z += tl.load(bias_ptrs, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if GATED and not INTERLEAVED:
            bias_ptrs += bias_up_offset
            up += tl.load(bias_ptrs, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(z, (BM, BN, 2)))
    else:
        gate = z
    if SAVE_Z:
        store_z(z_PP, gate, up, row, ours, column, F, GATED, INTERLEAVED, ROUND, BN)
    if SAVE_H:
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        h = nonlinear(gate, ACTIVATION, ALPHA)
        if ACTIVATION == "clamped_swiglu":
            up += 1.0
        if GATED:
            h = h * up
        if ROUND:
            h = round_bf16(h)
        h_ptrs = h_PF + row[:, None].to(tl.int64) * F + f[None, :]
        tl.store(h_ptrs, h.to(h_PF.dtype.element_ty), mask=ours[:, None] & (f[None, :] < F))


@triton.jit
def down(
    h_PF,
    w_EDF,
    bias_ED,
    v_PR,
    b_EDR,
    y_PD,
    squares_NP,
    expert_B,
    row_B,
    end_B,
    blocks,
    pairs,
    stride_e,
    stride_d,
    stride_f,
    bias_stride_e,
    bias_stride_d,
    lora_stride_e,
    lora_stride_d,
    lora_stride_r,
    D: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    SALIENCY: tl.constexpr,
    SAVE_Y: tl.constexpr,
    ROUND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, column = tile_of_program(blocks, (D + BN - 1) // BN, GROUP)
    expert = tl.load(expert_B + tile).to(tl.int64)
    if expert < 0:
        return
    start_row = tl.load(row_B + tile)
    end = tl.load(end_B + tile)
    row = start_row + tl.arange(0, BM)
    ours = row < end
    d = column * BN + tl.arange(0, BN)
    f = tl.arange(0, BK)
    h_ptrs = h_PF + tl.minimum(row, end - 1)[:, None].to(tl.int64) * F + f[None, :]
    w_ptrs = w_EDF + expert * stride_e + d[None, :] * stride_d + f[:, None] * stride_f
    y = tl.zeros((BM, BN), tl.float32)
    for start in range(0, F, BK):
        if F % BK == 0:
            h = tl.load(h_ptrs)
        else:
            h = tl.load(h_ptrs, mask=f[None, :] < F - start, other=0.0)
        if F % BK == 0 and D % BN == 0:
            w = tl.load(w_ptrs)
        else:
            inside = (f[:, None] < F - start) & (d[None, :] < D)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        y = tl.dot(h, w, y, input_precision="ieee")
        h_ptrs += BK
        w_ptrs += BK * stride_f
    if RANK > 0:
        b_ptrs = b_EDR + expert * lora_stride_e + d * lora_stride_d
        y = add_low_rank(y, v_PR, row, ours, b_ptrs, d < D, lora_stride_r, RANK, BR)
    if BIAS:
        bias_ptrs = bias_ED + expert * bias_stride_e + d * bias_stride_d
        y += tl.load(bias_ptrs, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if SALIENCY:  # columns past D are 0
        squares_ptrs = squares_NP + column.to(tl.int64) * pairs + row
        tl.store(squares_ptrs, tl.sum(y * y, 1), mask=ours)
    if SAVE_Y:
        if ROUND:
            y = round_bf16(y)
        y_ptrs = y_PD + row[:, None].to(tl.int64) * D + d[None, :]
        tl.store(y_ptrs, y.to(y_PD.dtype.element_ty), mask=ours[:, None] & (d[None, :] < D))
