# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The router's backward, one kernel: from the gradient of the weights to that of the logits.

Which experts are chosen has no gradient; neither has the correction bias, which only chooses.
Scores are computed again from the logits, so the forward keeps nothing but its inputs and its
choice. For one token, with a = dL/dg_S brought back through scale and renormalisation to the
scores s_S of the chosen:

    one logit alone        dz_e = Σ_j [e = e_j] a_j s'(z_j)
    softmax over all       dz_e = Σ_j [e = e_j] a_j s_j − p_e Σ_j a_j s_j
    softmax over chosen    the same, over the chosen
    sparsemixer            the same for every pick, with that pick's softmax

Shape suffixes: T tokens, E experts, K top-k; B… padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_compose.kernels.triton_router import chosen_scores, near_softmax, norm, softcap


@triton.jit
def slope(z_TK, s_TK, SCORE: tl.constexpr):
    """ds/dz of a chosen score in its own logit; of a softmax, the part that is not the row's."""
    if SCORE == "sigmoid" or SCORE == "topk_sigmoid":
        return s_TK * tl.sigmoid(-z_TK)
    elif SCORE == "sqrtsoftplus":
        return tl.where(s_TK == 0.0, 0.0, tl.sigmoid(z_TK) / (2.0 * s_TK))
    else:
        return s_TK


@triton.jit
def unnormalised(g_TK, s_TK, EPSILON: tl.constexpr, FLOOR: tl.constexpr, NORM_P: tl.constexpr):
    """The gradient of `g = s / (max(‖s‖, floor) + epsilon)` in s."""
    norm_T = norm(s_TK, NORM_P)
    divisor_T1 = (tl.where(norm_T < FLOOR, FLOOR, norm_T) + EPSILON)[:, None]
    through_T1 = tl.where(norm_T < FLOOR, 0.0, tl.sum(g_TK * (s_TK / divisor_T1), 1))[:, None]
    if NORM_P is not None and NORM_P != 1.0:
        ratio_TK = s_TK / tl.where(norm_T == 0.0, 1.0, norm_T)[:, None]
        if NORM_P != 2.0:
            ratio_TK = tl.exp((NORM_P - 1.0) * tl.log(ratio_TK))
        through_T1 = through_T1 * ratio_TK
    return (g_TK - through_T1) / divisor_T1


@triton.jit
def backward(
    logits_TE,
    scale_E,
    experts_TK,
    grad_TK,
    grad_TE,
    tokens,
    stride_t,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    NORM_P: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    JITTER: tl.constexpr,
    SCALED: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    """From the weights' gradient to the logits'; the choice itself has none."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    e = tl.arange(0, BE)
    inside = (t[:, None] < tokens) & (k[None, :] < TOP_K)
    pairs = t[:, None].to(tl.int64) * TOP_K + k[None, :]
    rows = logits_TE + t[:, None].to(tl.int64) * stride_t
    there = (t[:, None] < tokens) & (e[None, :] < E)
    z_TE = tl.load(rows + e[None, :], mask=there, other=0.0).to(tl.float32)
    z_TE = tl.where(e[None, :] < E, softcap(z_TE, CAP), float("-inf"))
    largest_T = tl.max(z_TE, 1)
    p_TE = tl.exp(z_TE - largest_T[:, None])
    total_T = tl.sum(p_TE, 1)
    chosen_TK = tl.load(experts_TK + pairs, mask=inside, other=0).to(tl.int32)
    g_TK = tl.load(grad_TK + pairs, mask=inside, other=0.0) * SCALE
    if SCALED:
        g_TK *= tl.load(scale_E + chosen_TK, mask=inside, other=0.0).to(tl.float32)
    if SCORE != "sparsemixer":
        z_TK = tl.load(rows + chosen_TK, mask=inside, other=0.0).to(tl.float32)
        z_TK = softcap(z_TK, CAP)
        s_TK = chosen_scores(z_TK, k[None, :] < TOP_K, largest_T, total_T, SCORE)
        if RENORMALISE:
            g_TK = unnormalised(g_TK, s_TK, EPSILON, FLOOR, NORM_P)
        if SCORE == "topk_softmax":
            g_TK -= tl.sum(g_TK * s_TK, 1)[:, None]
        g_TK = g_TK * slope(z_TK, s_TK, SCORE)
    d_TE = tl.zeros((BT, BE), tl.float32)
    left_TE = z_TE
    for j in range(TOP_K):
        expert_T = tl.sum(tl.where(k[None, :] == j, chosen_TK, 0), 1)
        g_T = tl.sum(tl.where(k[None, :] == j, g_TK, 0.0), 1)
        here = e[None, :] == expert_T[:, None]
        if SCORE == "sparsemixer":
            best_T = tl.sum(tl.where(here, left_TE, 0.0), 1)
            near_TE = near_softmax(z_TE, left_TE, best_T, JITTER)
            g_T *= tl.sum(tl.where(here, near_TE, 0.0), 1)
            d_TE -= g_T[:, None] * near_TE
            left_TE = tl.where(here, float("-inf"), left_TE)
        d_TE += tl.where(here, g_T[:, None], 0.0)
    if SCORE == "softmax":
        d_TE -= p_TE / total_T[:, None] * tl.sum(g_TK, 1)[:, None]
    if CAP is not None:
        d_TE *= 1.0 - (z_TE / CAP) * (z_TE / CAP)
    grads = grad_TE + t[:, None].to(tl.int64) * E + e[None, :]
    tl.store(grads, d_TE.to(grad_TE.dtype.element_ty), mask=there)
