"""The eager reference: what the kernels compute, in plain torch, one expert after another.

Routed tokens only. It asks the device how many there are for each expert, which the kernels never
do. Differentiable in everything.

Against transformers' own eager experts: the same, but the weighted sum is in fp32 (fp64 in fp64),
and rounded once.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, N an expert's tokens,
P = 2F if gated, F otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moe_compose.kernels.layout import ExpertLayout, ExpertWeights, check
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.saliency import Saliency

#: Rows of an expert that `moe_saliency` holds the outputs of at a time.
_ROWS = 1024


def moe_forward(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    dtype: torch.dtype | None = None,
    saliency: Saliency | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """`y_t = Σ_j g_tj · f_{e_tj}(x_t)`.

    Args:
        x_TD: the tokens.
        weights: the experts.
        layout: how they lie.
        experts_TK: ids; those outside `0..E-1` count for nothing.
        weights_TK: g.
        dtype: what is computed in, and returned; that of `x_TD` if not given.
        saliency: sums to add this call's pairs to.
        lora: low-rank additions to the experts.

    Returns:
        `[T, D]`.

    Raises:
        OptionError: shapes that don't fit.
    """
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency, lora)
    dtype = dtype or x_TD.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_TD, weights_TK = x_TD.to(dtype), weights_TK.to(wide)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    for e in range(weights.experts):
        token_N, slot_N = torch.where(experts_TK == e)
        if not len(token_N):
            continue
        f_ND = expert_forward(x_TD[token_N], weights, layout, e, lora)
        g_N = weights_TK[token_N, slot_N]
        y_TD = y_TD.index_add(0, token_N, g_N[:, None] * f_ND.to(wide))
        if saliency is not None:
            saliency.add(e, g_N, f_ND)
    return y_TD.to(dtype)


@torch.no_grad()
def moe_saliency(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    saliency: Saliency,
    *,
    dtype: torch.dtype | None = None,
    lora: ExpertLora | None = None,
) -> None:
    """The saliency of a `moe_forward` whose output nobody wants, a few rows at a time.

    Arguments are those of `moe_forward`.

    Raises:
        OptionError: shapes that don't fit.
    """
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency, lora)
    for e in range(weights.experts):
        token_N, slot_N = torch.where(experts_TK == e)
        for start in range(0, len(token_N), _ROWS):
            tokens, slots = token_N[start : start + _ROWS], slot_N[start : start + _ROWS]
            f_ND = expert_forward(x_TD[tokens].to(dtype or x_TD.dtype), weights, layout, e, lora)
            saliency.add(e, weights_TK[tokens, slots], f_ND)


def expert_forward(
    x_ND: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    expert: int,
    lora: ExpertLora | None = None,
) -> Tensor:
    """One expert on its tokens, before the router's weight; `[N, D]`."""
    z_NP = _linear(x_ND, weights.gate_up, weights.gate_up_bias, expert, layout)
    if lora is not None:
        z_NP = z_NP + _low_rank(x_ND, lora.gate_up_a, lora.gate_up_b, expert, lora.scale)
    h_NF = activate(z_NP, layout)
    y_ND = _linear(h_NF, weights.down, weights.down_bias, expert, layout)
    if lora is not None:
        y_ND = y_ND + _low_rank(h_NF, lora.down_a, lora.down_b, expert, lora.scale)
    return y_ND


def activate(z_NP: Tensor, layout: ExpertLayout) -> Tensor:
    """From the first matrix's output to the second's input, `[N, F]`."""
    if not layout.gated:
        return _nonlinear(z_NP, layout)
    if layout.interleaved:
        gate_NF, up_NF = z_NP[..., ::2], z_NP[..., 1::2]
    else:
        gate_NF, up_NF = z_NP.chunk(2, dim=-1)
    if layout.limit is not None:
        gate_NF = gate_NF.clamp(max=layout.limit)
        up_NF = up_NF.clamp(min=-layout.limit, max=layout.limit)
    if layout.activation == "clamped_swiglu":
        up_NF = up_NF + 1
    return _nonlinear(gate_NF, layout) * up_NF


def _nonlinear(z: Tensor, layout: ExpertLayout) -> Tensor:
    match layout.activation:
        case "silu":
            return functional.silu(z)
        case "gelu":
            return functional.gelu(z)
        case "gelu_tanh":
            return functional.gelu(z, approximate="tanh")
        case "relu":
            return functional.relu(z)
        case "relu2":
            return functional.relu(z).square()
        case "clamped_swiglu":
            return z * torch.sigmoid(z * layout.alpha)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, layout: ExpertLayout
) -> Tensor:
    matrix = weight[expert].to(x.dtype)
    offset = None if bias is None else bias[expert].to(x.dtype)
    return functional.linear(x, matrix.T if layout.transposed else matrix, offset)


def _low_rank(
    x: Tensor, a: Tensor | None, b: Tensor | None, expert: int, scale: float
) -> Tensor | float:
    """`s · B A x`; 0 where there is none."""
    if a is None or b is None:
        return 0.0
    u = functional.linear(x, a[expert].to(x.dtype))
    return functional.linear(scale * u, b[expert].to(x.dtype))
