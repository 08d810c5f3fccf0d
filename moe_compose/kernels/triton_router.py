# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The router as one kernel: from logits to the chosen experts and their weights.

A program holds the logits of a few tokens in registers, one row per token. Choosing is top-k rounds
of "largest, lowest index of equals": a maximum, then a minimum over the columns that hold it. A
sort would want powers of two for k, and leaves the order of ties open.

Experts are compared as integers in the order of their scores, for three reasons: NaN has a place
(above all, as in `torch.sort`), −inf is above what has already been taken, and padding is below
both, so k ≤ E rounds always end with k different experts.

In groups, columns are padded group by group: expert e is at column `e // P · BP + e % P`. The
order of columns is then that of experts, and a group's worth is a reduction of a reshaped tile.

Weights are computed over the k chosen, whose logits are read once more, so experts that something
else chose take the same way.

Shape suffixes: T tokens, E experts, K top-k; P experts per group, G groups; B… padded to a power of
two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x80000000)
HIGHEST = tl.constexpr(0x7FFFFFFF)
MINUS_INF = tl.constexpr(-0x7F800001)  # `in_order(-inf)`


@triton.jit
def in_order(x):
    """int32 in the order of the floats `x`: NaN above all, −0 equal to 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, HIGHEST, bits ^ ((bits >> 31) & HIGHEST))


@triton.jit
def float_of(key):
    """The inverse of `in_order`."""
    return (key ^ ((key >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def first_of_largest(keys, columns):
    """Per row the lowest of the columns that hold the largest key; keys `[T, C]`."""
    largest = tl.max(keys, 1)
    return tl.min(tl.where(keys == largest[:, None], columns[None, :], HIGHEST), 1)


@triton.jit
def log1p(x):
    """Exact for small x, where `1 + x` is not: its rounding error is divided out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def tanh(x):
    """A polynomial near 0, where `1 − 2/(e^2x + 1)` cancels (Cephes' `tanhf`)."""
    a, q = tl.abs(x), x * x
    series = ((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q
    series = x + x * q * ((series + 1.33314422036e-1) * q - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, series, tl.where(x < 0.0, -far, far))


@triton.jit
def softcap(z, CAP: tl.constexpr):
    if CAP is not None:
        z = tanh(z / CAP) * CAP
    return z


@triton.jit
def score(z, SCORE: tl.constexpr):
    """Of one logit alone; a softmax needs its row."""
    if SCORE == "sigmoid" or SCORE == "topk_sigmoid":
        return tl.sigmoid(z)
    elif SCORE == "sqrtsoftplus":
        return tl.sqrt(tl.maximum(z, 0.0) + log1p(tl.exp(-tl.abs(z))))
    else:
        return z


@triton.jit
def norm(s_TK, NORM_P: tl.constexpr):
    """‖s‖ over the k chosen, all of them ≥ 0."""
    if NORM_P is None or NORM_P == 1.0:
        return tl.sum(s_TK, 1)
    elif NORM_P == 2.0:
        return tl.sqrt(tl.sum(s_TK * s_TK, 1))
    else:
        return tl.exp(tl.log(tl.sum(tl.exp(NORM_P * tl.log(s_TK)), 1)) / NORM_P)


@triton.jit
def chosen_scores(z_TK, inside, largest_T, total_T, SCORE: tl.constexpr):
    """s_S: of the chosen, before they are renormalised; 0 in the padding."""
    if SCORE == "softmax":
        s_TK = tl.exp(z_TK - largest_T[:, None]) / total_T[:, None]
    elif SCORE == "topk_softmax":
        z_TK = tl.where(inside, z_TK, float("-inf"))
        s_TK = tl.exp(z_TK - tl.max(z_TK, 1)[:, None])
        s_TK = tl.where(inside, s_TK, 0.0)
        s_TK = s_TK / tl.sum(s_TK, 1)[:, None]
    else:
        s_TK = score(z_TK, SCORE)
    return tl.where(inside, s_TK, 0.0)


@triton.jit
def top_columns(keys, columns, TOP_K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Per row the columns of the `TOP_K` largest keys, largest first, `[BT, BK]`."""
    k = tl.arange(0, BK)
    found_TK = tl.zeros((BT, BK), tl.int32)
    for j in range(TOP_K):
        best_T = first_of_largest(keys, columns)
        found_TK = tl.where(k[None, :] == j, best_T[:, None], found_TK)
        keys = tl.where(columns[None, :] == best_T[:, None], LOWEST, keys)
    return found_TK


@triton.jit
def best_groups(
    keys,
    GROUP_SCORE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
):
    """`keys` `[BT, BG·BP]` with −inf outside the `TOP_GROUPS` best groups."""
    keys = tl.reshape(keys, (BT, BG, BP))
    worth_TG = tl.max(keys, 2)
    group = tl.arange(0, BG)
    if GROUP_SCORE == "top2":
        p = tl.arange(0, BP)[None, None, :]
        first_TG = tl.min(tl.where(keys == worth_TG[:, :, None], p, HIGHEST), 2)
        second_TG = tl.max(tl.where(p == first_TG[:, :, None], LOWEST, keys), 2)
        worth_TG = in_order(float_of(worth_TG) + float_of(second_TG))
    worth_TG = tl.where(group[None, :] < GROUPS, worth_TG, LOWEST)
    best_TG = tl.zeros((BT, BG), tl.int32)
    for _ in range(TOP_GROUPS):
        taken = group[None, :] == first_of_largest(worth_TG, group)[:, None]
        best_TG = tl.where(taken, 1, best_TG)
        worth_TG = tl.where(taken, LOWEST, worth_TG)
    keys = tl.where(best_TG[:, :, None] > 0, keys, tl.minimum(keys, MINUS_INF))
    return tl.reshape(keys, (BT, BG * BP))


@triton.jit
def near_softmax(z_TE, left_TE, best_T, JITTER: tl.constexpr):
    """PhiMoE's softmax over the logits that are left and close to the best of them."""
    reach_TE = tl.maximum(tl.abs(z_TE), best_T[:, None])
    far_TE = tl.div_rn(best_T[:, None] - z_TE, reach_TE) > 2 * JITTER
    near_TE = tl.exp(tl.where(far_TE, float("-inf"), left_TE) - best_T[:, None])
    return near_TE / tl.sum(near_TE, 1)[:, None]


@triton.jit
def sparsemixer(
    z_TE,
    real,
    columns,
    TOP_K: tl.constexpr,
    JITTER: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """PhiMoE's picks and weights, `[BT, BK]` each."""
    k = tl.arange(0, BK)
    found_TK = tl.zeros((BT, BK), tl.int32)
    weights_TK = tl.zeros((BT, BK), tl.float32)
    left_TE = z_TE
    for j in range(TOP_K):
        keys = tl.where(real[None, :], in_order(left_TE), LOWEST)
        pick_T = first_of_largest(keys, columns)
        here = columns[None, :] == pick_T[:, None]
        best_T = tl.sum(tl.where(here, left_TE, 0.0), 1)
        near_TE = near_softmax(z_TE, left_TE, best_T, JITTER)
        weight_T = tl.sum(tl.where(here, near_TE, 0.0), 1)
        found_TK = tl.where(k[None, :] == j, pick_T[:, None], found_TK)
        weights_TK = tl.where(k[None, :] == j, weight_T[:, None], weights_TK)
        left_TE = tl.where(here, float("-inf"), left_TE)
    return found_TK, weights_TK


@triton.jit
def forward(
    logits_TE,
    bias_E,
    scale_E,
    given_TK,
    weights_TK,
    experts_TK,
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
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    GIVEN: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Chosen experts and their weights; `given_TK` are the experts with `GIVEN`."""
    P: tl.constexpr = E // GROUPS
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    columns = tl.arange(0, BG * BP)
    expert = columns // BP * P + columns % BP
    real = (columns // BP < GROUPS) & (columns % BP < P)
    inside = (t[:, None] < tokens) & (k[None, :] < TOP_K)
    pairs = t[:, None].to(tl.int64) * TOP_K + k[None, :]
    rows = logits_TE + t[:, None].to(tl.int64) * stride_t
    there = (t[:, None] < tokens) & real[None, :]
    z_TE = tl.load(rows + expert[None, :], mask=there, other=0.0).to(tl.float32)
    z_TE = tl.where(real[None, :], softcap(z_TE, CAP), float("-inf"))
    largest_T = tl.max(z_TE, 1)
    total_T = tl.sum(tl.exp(z_TE - largest_T[:, None]), 1)
    if GIVEN:
        chosen_TK = tl.load(given_TK + pairs, mask=inside, other=0).to(tl.int32)
    elif SCORE == "sparsemixer":
        chosen_TK, w_TK = sparsemixer(z_TE, real, columns, TOP_K, JITTER, BT, BK)
    else:
        if SCORE == "softmax":
            s_TE = tl.exp(z_TE - largest_T[:, None]) / total_T[:, None]
        elif SCORE == "topk_sigmoid":
            s_TE = z_TE
        else:
            s_TE = score(z_TE, SCORE)
        if BIASED:
            s_TE += tl.load(bias_E + expert, mask=real, other=0.0).to(tl.float32)[None, :]
        keys = tl.where(real[None, :], in_order(s_TE), LOWEST)
        if GROUPS > 1:
            keys = best_groups(keys, GROUP_SCORE, GROUPS, TOP_GROUPS, BT, BG, BP)
        found_TK = top_columns(keys, columns, TOP_K, BT, BK)
        chosen_TK = found_TK // BP * P + found_TK % BP
    if SCORE != "sparsemixer":
        z_TK = tl.load(rows + chosen_TK, mask=inside, other=0.0).to(tl.float32)
        w_TK = chosen_scores(softcap(z_TK, CAP), k[None, :] < TOP_K, largest_T, total_T, SCORE)
        if RENORMALISE:
            norm_T = norm(w_TK, NORM_P)
            w_TK = w_TK / (tl.where(norm_T < FLOOR, FLOOR, norm_T) + EPSILON)[:, None]
    w_TK *= SCALE
    if SCALED:
        w_TK *= tl.load(scale_E + chosen_TK, mask=inside, other=0.0).to(tl.float32)
    tl.store(weights_TK + pairs, w_TK, mask=inside)
    tl.store(experts_TK + pairs, chosen_TK.to(tl.int64), mask=inside)
