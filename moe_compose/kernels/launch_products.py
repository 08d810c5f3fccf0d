# mypy: disable-error-code="import-untyped"
"""Launches the products of the forward, which the backward uses too.

Matrices are given as views `[E, out, in]`, whatever their layout: a transposed one as its `.mT`.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K, R rank, N
column tiles; the second P of z is 2F if gated, F otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_compose.kernels import triton_low_rank, triton_products
from moe_compose.kernels.configs import Tile
from moe_compose.kernels.launch_sort import FUSED, Sorted
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights


class Plan(NamedTuple):
    """What all products of one pass share.

    Attributes:
        order: the pairs by expert.
        rows, group: as in `Config`.
        top_k: K.
        emulate_bf16: round by hand, in fp32.
    """

    order: Sorted
    rows: int
    group: int
    top_k: int
    emulate_bf16: bool


class LowRank(NamedTuple):
    """`rows · matrixᵀ`, to be added to a product: `[P, R]`, and a view `[E, out, R]`."""

    rows_PR: Tensor  # noqa: N815
    matrix: Tensor


class LowRankArguments(NamedTuple):
    """The same as a kernel takes it; rank 0 if there is none."""

    rows: Tensor
    matrix: Tensor
    strides: tuple[int, ...]
    rank: int
    step: int

    @classmethod
    def of(cls, low_rank: LowRank | None, unused: Tensor) -> LowRankArguments:
        """`unused` stands for the tensors that are not there."""
        if low_rank is None:
            return cls(unused, unused, (0, 0, 0), 0, 16)
        rank = low_rank.rows_PR.shape[1]
        return cls(*low_rank, low_rank.matrix.stride(), rank, narrow(rank))


def narrow(size: int, most: int = 64) -> int:
    """The tile for a side that may be as small as a rank."""
    return int(min(most, max(16, triton.next_power_of_2(size))))


def oriented(matrix: Tensor, layout: ExpertLayout) -> Tensor:
    """`[E, out, in]`."""
    return matrix.mT if layout.transposed else matrix


def gate_up(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    plan: Plan,
    tile: Tile,
    low_rank: LowRank | None = None,
    *,
    save_h: bool = True,
    save_z: bool = False,
) -> tuple[Tensor, Tensor]:
    """`h` and `z` of every slot; what is not saved is empty."""
    model, width = weights.sizes(layout)
    matrix, bias, order = weights.gate_up, weights.gate_up_bias, plan.order
    fused = width * (2 if layout.gated else 1)
    stride_e, stride_p, stride_d = oriented(matrix, layout).stride()
    step, up = (2, 1) if layout.interleaved else (1, width)
    bias_e, bias_p = (0, 0) if bias is None else bias.stride()
    added = LowRankArguments.of(low_rank, matrix)
    lora_e, lora_p, lora_r = added.strides
    pairs, blocks = len(order.pair_of_P), len(order.expert_B)
    h_PF = x_TD.new_empty(pairs if save_h else 0, width)
    z_PP = x_TD.new_empty(pairs if save_z else 0, fused)
    triton_products.gate_up[blocks * triton.cdiv(width, tile.n),](
        x_TD,
        matrix,
        matrix if bias is None else bias,
        added.rows,
        added.matrix,
        h_PF,
        z_PP,
        order.pair_of_P,
        order.expert_B,
        order.row_B,
        order.end_B,
        blocks,
        x_TD.stride(0),
        stride_e,
        step * stride_p,
        stride_d,
        up * stride_p,
        step * bias_p,
        up * bias_p,
        bias_e,
        lora_e,
        step * lora_p,
        up * lora_p,
        lora_r,
        TOP_K=plan.top_k,
        D=model,
        F=width,
        GATED=layout.gated,
        INTERLEAVED=layout.interleaved,
        BIAS=bias is not None,
        ACTIVATION=layout.activation,
        ALPHA=layout.alpha,
        LIMIT=layout.limit,
        RANK=added.rank,
        BR=added.step,
        SAVE_H=save_h,
        SAVE_Z=save_z,
        ROUND=plan.emulate_bf16,
        BM=plan.rows,
        BN=tile.n,
        BK=tile.k,
        GROUP=plan.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return h_PF, z_PP


def down(
    h_PF: Tensor,
    matrix_EDF: Tensor,
    bias_ED: Tensor | None,
    plan: Plan,
    tile: Tile,
    low_rank: LowRank | None = None,
    *,
    saliency: bool = False,
    save_y: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rows in slot order times a matrix per expert, and the column tiles' parts of ‖y‖²; what is
    not wanted is empty."""
    pairs, width = h_PF.shape
    model, order = matrix_EDF.shape[1], plan.order
    stride_e, stride_d, stride_f = matrix_EDF.stride()
    bias_e, bias_d = (0, 0) if bias_ED is None else bias_ED.stride()
    added = LowRankArguments.of(low_rank, matrix_EDF)
    blocks, columns = len(order.expert_B), triton.cdiv(model, tile.n)
    y_PD = h_PF.new_empty(pairs if save_y else 0, model)
    squares_NP = h_PF.new_empty(columns if saliency else 0, pairs, dtype=torch.float32)
    triton_products.down[blocks * columns,](
        h_PF,
        matrix_EDF,
        matrix_EDF if bias_ED is None else bias_ED,
        added.rows,
        added.matrix,
        y_PD,
        squares_NP,
        order.expert_B,
        order.row_B,
        order.end_B,
        blocks,
        pairs,
        stride_e,
        stride_d,
        stride_f,
        bias_e,
        bias_d,
        *added.strides,
        D=model,
        F=width,
        BIAS=bias_ED is not None,
        RANK=added.rank,
        BR=added.step,
        SALIENCY=saliency,
        SAVE_Y=save_y,
        ROUND=plan.emulate_bf16,
        BM=plan.rows,
        BN=tile.n,
        BK=tile.k,
        GROUP=plan.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return y_PD, squares_NP


def project(
    rows: Tensor, matrix_ERC: Tensor, scale: float, plan: Plan, tile: Tile, *, gather: bool = False
) -> Tensor:
    """`scale · rows · matrixᵀ`, `[P, R]`; with `gather`, `rows` has one row per token.

    Only the step of `tile` along the reduction is used, and its stages.
    """
    _, rank, inputs = matrix_ERC.shape
    order = plan.order
    columns = narrow(rank)
    u_PR = rows.new_empty(len(order.pair_of_P), rank)
    triton_low_rank.project[len(order.expert_B) * triton.cdiv(rank, columns),](
        rows,
        matrix_ERC,
        u_PR,
        order.pair_of_P,
        order.expert_B,
        order.row_B,
        order.end_B,
        float(scale),
        rows.stride(0),
        *matrix_ERC.stride(),
        TOP_K=plan.top_k,
        C=inputs,
        R=rank,
        GATHER=gather,
        ROUND=plan.emulate_bf16,
        BM=plan.rows,
        BN=columns,
        BK=tile.k,
        num_warps=4,
        num_stages=tile.stages,
        **FUSED,
    )
    return u_PR
