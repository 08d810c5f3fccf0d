# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""What several kernels are made of: rounding, the activations and their derivatives, the low-rank
addition, and z's two halves in the layers' layouts.

Shape suffixes: P pairs = T·K, F expert width, R rank; the second P of z is 2F if gated, F
otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def nonlinear(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "clamped_swiglu":
        return z * tl.sigmoid(ALPHA * z)
    else:
        z = tl.maximum(z, 0.0)
        if ACTIVATION == "relu2":
            z = z * z
        return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Of `nonlinear`; relu's is 0 at 0, as torch's."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":  # Φ(z) + z φ(z)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        return s + z * s * (1.0 - s) * slope
    elif ACTIVATION == "clamped_swiglu":
        s = tl.sigmoid(ALPHA * z)
        return s * (1.0 + ALPHA * z * (1.0 - s))
    else:
        if ACTIVATION == "relu2":
            return 2.0 * tl.maximum(z, 0.0)
        else:
            return (z > 0.0).to(tl.float32)


@triton.jit
def add_low_rank(
    total, u_PR, row, ours, b_ptrs, inside, stride_r, RANK: tl.constexpr, BR: tl.constexpr
):
    """`total + u bᵀ`; `b_ptrs`: rank 0 of each column, `inside`: which columns exist."""
    for start in range(0, RANK, BR):
        r = start + tl.arange(0, BR)
        u_ptrs = u_PR + row[:, None].to(tl.int64) * RANK + r[None, :]
        u = tl.load(u_ptrs, mask=ours[:, None] & (r[None, :] < RANK), other=0.0)
        there = (r[:, None] < RANK) & inside[None, :]
        b = tl.load(b_ptrs[None, :] + r[:, None] * stride_r, mask=there, other=0.0)
        total = tl.dot(u, b, total, input_precision="ieee")
    return total


@triton.jit
def store_z(
    z_PP,
    gate,
    up,
    row,
    ours,
    column,
    F: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr,
    BN: tl.constexpr,
):
    """Gate and up of one tile of columns, in the order of the first matrix's rows."""
    if ROUND:
        gate = round_bf16(gate)
        up = round_bf16(up)
    if INTERLEAVED:
        c = column * BN * 2 + tl.arange(0, BN * 2)
        z_ptrs = z_PP + row[:, None].to(tl.int64) * (2 * F) + c[None, :]
        both = tl.interleave(gate, up).to(z_PP.dtype.element_ty)
        tl.store(z_ptrs, both, mask=ours[:, None] & (c[None, :] < 2 * F))
    else:
        f = column * BN + tl.arange(0, BN)
        width: tl.constexpr = F * 2 if GATED else F
        z_ptrs = z_PP + row[:, None].to(tl.int64) * width + f[None, :]
        there = ours[:, None] & (f[None, :] < F)
        tl.store(z_ptrs, gate.to(z_PP.dtype.element_ty), mask=there)
        if GATED:
            tl.store(z_ptrs + F, up.to(z_PP.dtype.element_ty), mask=there)


@triton.jit
def load_z(
    z_PP,
    row,
    ours,
    column,
    F: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
):
    """What `store_z` stored, in fp32; not gated, both are the same."""
    if INTERLEAVED:
        c = column * BN * 2 + tl.arange(0, BN * 2)
        z_ptrs = z_PP + row[:, None].to(tl.int64) * (2 * F) + c[None, :]
        both = tl.load(z_ptrs, mask=ours[:, None] & (c[None, :] < 2 * F), other=0.0)
        gate, up = tl.split(tl.reshape(both, (row.shape[0], BN, 2)))
    else:
        f = column * BN + tl.arange(0, BN)
        width: tl.constexpr = F * 2 if GATED else F
        z_ptrs = z_PP + row[:, None].to(tl.int64) * width + f[None, :]
        there = ours[:, None] & (f[None, :] < F)
        gate = tl.load(z_ptrs, mask=there, other=0.0)
        up = gate
        if GATED:
            up = tl.load(z_ptrs + F, mask=there, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)
