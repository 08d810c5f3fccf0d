# mypy: disable-error-code="import-untyped"
"""Launches the backward's own kernels (`triton_backward.py`, `triton_weight_gradient.py`).

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K, N column
tiles; the second P of z and dz is 2F if gated, F otherwise. A weight gradient's sides are M and N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_compose.kernels import triton_backward, triton_weight_gradient
from moe_compose.kernels.backward_configs import BackwardConfig
from moe_compose.kernels.launch_products import (
    LowRank,
    LowRankArguments,
    Plan,
    narrow,
    oriented,
)
from moe_compose.kernels.launch_sort import FUSED
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.triton_forward import INTERPRETED


class Hidden(NamedTuple):
    """What `hidden_gradient` leaves; empty, where it was not asked for."""

    dz_PP: Tensor  # noqa: N815
    h_PF: Tensor  # noqa: N815
    parts_NP: Tensor  # noqa: N815


def hidden_gradient(
    dout_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    z_PP: Tensor,
    gates_P: Tensor,
    plan: Plan,
    config: BackwardConfig,
    low_rank: LowRank | None = None,
    *,
    dz: Tensor | None,
    hidden: bool,
    gates: bool,
) -> Hidden:
    """dz (written to `dz`, which may be z itself), g·h, and the parts of d(g)."""
    model, width = weights.sizes(layout)
    tile, order = config.hidden, plan.order
    matrix_EDF = oriented(weights.down, layout)
    added = LowRankArguments.of(low_rank, matrix_EDF)
    lora_e, lora_f, lora_r = added.strides
    pairs, blocks = len(order.pair_of_P), len(order.expert_B)
    columns = triton.cdiv(width, tile.n)
    h_PF = dout_TD.new_empty(pairs if hidden else 0, width)
    parts_NP = gates_P.new_empty(columns if gates else 0, pairs)
    dz_PP = dout_TD.new_empty(0) if dz is None else dz
    triton_backward.hidden_gradient[blocks * columns,](
        dout_TD,
        matrix_EDF,
        added.rows,
        added.matrix,
        z_PP,
        gates_P,
        dz_PP,
        h_PF,
        parts_NP,
        order.pair_of_P,
        order.expert_B,
        order.row_B,
        order.end_B,
        blocks,
        pairs,
        *matrix_EDF.stride(),
        lora_e,
        lora_f,
        lora_r,
        TOP_K=plan.top_k,
        D=model,
        F=width,
        GATED=layout.gated,
        INTERLEAVED=layout.interleaved,
        ACTIVATION=layout.activation,
        ALPHA=layout.alpha,
        LIMIT=layout.limit,
        RANK=added.rank,
        BR=added.step,
        GATES=gates,
        HIDDEN=hidden,
        INPUT=dz is not None,
        ROUND=plan.emulate_bf16,
        BM=plan.rows,
        BN=tile.n,
        BK=tile.k,
        GROUP=plan.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return Hidden(dz_PP, h_PF, parts_NP)


def gate_gradient(
    parts_NP: Tensor,
    dout_TD: Tensor,
    bias_ED: Tensor | None,
    experts_TK: Tensor,
    plan: Plan,
    dtype: torch.dtype,
) -> Tensor:
    """d(g), `[T, K]`."""
    columns, pairs = parts_NP.shape
    dgates_TK = torch.empty(experts_TK.shape, dtype=dtype, device=dout_TD.device)
    bias_e, bias_d = (0, 0) if bias_ED is None else bias_ED.stride()
    triton_backward.gate_gradient[triton.cdiv(pairs, 32),](
        parts_NP,
        dout_TD,
        dout_TD if bias_ED is None else bias_ED,
        experts_TK.flatten().contiguous(),
        plan.order.slot_of_P,
        dgates_TK,
        pairs,
        bias_e,
        bias_d,
        TOP_K=plan.top_k,
        D=dout_TD.shape[1],
        COLUMNS=columns,
        BIAS=bias_ED is not None,
        BP=32,
        BD=128,
        **FUSED,
    )
    return dgates_TK


def weight_gradient(
    a: Tensor,
    b: Tensor,
    out_EMN: Tensor,
    plan: Plan,
    config: BackwardConfig,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
) -> None:
    """Fills `out` with `Σ aᵀ b` over each expert's slots; gathered, an operand is per token."""
    experts, m, n = out_EMN.shape
    tile, order = config.weight, plan.order
    rows, columns, warps = weight_tile(config, m, n)
    grid = experts * triton.cdiv(m, rows) * triton.cdiv(n, columns)
    triton_weight_gradient.weight_gradient[grid,](
        a,
        b,
        out_EMN,
        order.pair_of_P,
        order.starts_E,
        order.totals_E,
        a.stride(0),
        b.stride(0),
        *out_EMN.stride(),
        TOP_K=plan.top_k,
        M=m,
        N=n,
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        PIPELINED=not INTERPRETED,
        ROUND=plan.emulate_bf16,
        BM=rows,
        BN=columns,
        BK=tile.k,
        num_warps=warps,
        num_stages=tile.stages,
        **FUSED,
    )


def weight_tile(config: BackwardConfig, m: int, n: int) -> tuple[int, int, int]:
    """Rows, columns and warps for a weight gradient of these sides; a rank takes a narrow tile, of
    which more warps than four would have too little each to copy."""
    rows, columns = narrow(m, config.weight_rows), narrow(n, config.weight.n)
    whole = config.weight_rows * config.weight.n
    return rows, columns, config.weight.warps if rows * columns == whole else 4


def bias_gradient(
    rows: Tensor, gates_P: Tensor, out_EN: Tensor, plan: Plan, *, routed: bool = False
) -> None:
    """Fills `out` with the sums of each expert's rows; `routed`: of its tokens', weighted."""
    experts, n = out_EN.shape
    columns = narrow(n)
    triton_weight_gradient.bias_gradient[experts * triton.cdiv(n, columns),](
        rows,
        gates_P,
        out_EN,
        plan.order.pair_of_P,
        plan.order.starts_E,
        plan.order.totals_E,
        *out_EN.stride(),
        TOP_K=plan.top_k,
        N=n,
        ROUTED=routed,
        PIPELINED=not INTERPRETED,
        ROUND=plan.emulate_bf16,
        BN=columns,
        BK=32,
        **FUSED,
    )
