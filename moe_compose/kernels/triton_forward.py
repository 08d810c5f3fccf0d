# mypy: disable-error-code="import-untyped"
"""Launches the kernels: four to sort, two products, one to combine, one more for saliency.

Nothing here asks the device for a value, so the host runs ahead and a CUDA graph can hold it all.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K, L tiles of
pairs, B tiles of rows, N column tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_compose.errors import OptionError
from moe_compose.kernels import triton_combine, triton_products, triton_sort
from moe_compose.kernels.configs import Config, arch_of, config_for
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights, check
from moe_compose.kernels.saliency import Saliency

#: Pairs per tile of the sort, tiles per step of its scan, experts per program, tiles per program.
_SORT_PAIRS, _SCAN_TILES, _SORT_EXPERTS, _SCHEDULE_TILES = 128, 256, 128, 32

#: Triton 3.10 turns multiply-add fusion off unless it is asked for.
_FUSED = {"enable_fp_fusion": True}

#: Whether kernels run in Triton's interpreter; fixed when triton is first imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Sorted(NamedTuple):
    """Pairs in the order of their experts, and how programs share them; see `triton_sort`."""

    pair_of_P: Tensor  # noqa: N815
    slot_of_P: Tensor  # noqa: N815
    starts_E: Tensor  # noqa: N815
    totals_E: Tensor  # noqa: N815
    expert_B: Tensor  # noqa: N815
    row_B: Tensor  # noqa: N815
    end_B: Tensor  # noqa: N815


def moe_forward(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    dtype: torch.dtype | None = None,
    saliency: Saliency | None = None,
    config: Config | None = None,
    emulate_bf16: bool = False,
) -> Tensor:
    """The reference's `moe_forward` on an accelerator, or in Triton's interpreter.

    Args:
        x_TD: the tokens; bf16, fp16 or fp32. No gradients.
        weights: the experts, in the same dtype.
        layout: how they lie.
        experts_TK: ids; those outside `0..E-1` count for nothing.
        weights_TK: g.
        dtype: of the result; that of `x_TD` if not given.
        saliency: sums to add this call's pairs to.
        config: tiles; by the table if not given.
        emulate_bf16: the tensors are fp32 and hold bf16 values: round what a bf16 layer rounds.

    Returns:
        `[T, D]`.

    Raises:
        OptionError: shapes that don't fit, or a device that the table lacks.
    """
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency)
    tokens, top_k = experts_TK.shape
    out_TD = torch.empty_like(
        x_TD, dtype=dtype or x_TD.dtype, memory_format=torch.contiguous_format
    )
    if not experts_TK.numel():
        return out_TD.zero_()
    arch, rows = arch_of(x_TD.device), tokens * top_k / weights.experts
    config = config or config_for(arch, rows, x_TD.element_size(), *weights.sizes(layout))
    if config is None:
        raise OptionError(
            f"no tiles are known for {arch}", hint="Pass config=, or use the eager reference."
        )
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    gates_P = weights_TK.float().flatten().contiguous()  # a [T, 1] slice flattens to a strided view
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        order = sort_pairs(experts_TK, weights.experts, config.rows)
        h_PF = _gate_up(x_TD, weights, layout, order, top_k, config, emulate_bf16)
        y_PD, squares_NP = _down(
            h_PF, weights, layout, order, config, saliency is not None, emulate_bf16
        )
        _combine(y_PD, gates_P, order, out_TD, top_k, emulate_bf16)
        if saliency is not None:
            _add_saliency(squares_NP, gates_P, order, saliency)
    return out_TD


def sort_pairs(experts_TK: Tensor, experts: int, rows: int) -> Sorted:
    """Order the pairs by expert and cut them into tiles of `rows`."""
    ids_P = experts_TK.flatten().contiguous()
    pairs, device = len(ids_P), ids_P.device
    tiles = triton.cdiv(pairs, _SORT_PAIRS)
    # Every expert that has a row may leave one tile unfilled.
    blocks = (pairs + min(experts, pairs) * (rows - 1)) // rows
    sizes = [pairs, pairs, experts, experts, blocks, blocks, blocks]
    order = Sorted(*(torch.empty(n, dtype=torch.int32, device=device) for n in sizes))
    counts_LE = torch.empty(tiles, experts, dtype=torch.int32, device=device)
    before_LE = torch.empty_like(counts_LE)
    padded = triton.next_power_of_2(experts)
    chunk = min(padded, _SORT_EXPERTS)
    triton_sort.histogram[tiles, padded // chunk](
        ids_P, counts_LE, pairs, E=experts, BE=chunk, BP=_SORT_PAIRS, **_FUSED
    )
    triton_sort.scan[experts,](
        counts_LE, before_LE, order.totals_E, tiles, E=experts, BL=_SCAN_TILES, **_FUSED
    )
    triton_sort.schedule[triton.cdiv(blocks, _SCHEDULE_TILES),](
        order.totals_E,
        order.starts_E,
        order.expert_B,
        order.row_B,
        order.end_B,
        blocks,
        ROWS=rows,
        E=experts,
        E_PADDED=padded,
        BB=_SCHEDULE_TILES,
        **_FUSED,
    )
    triton_sort.scatter[tiles,](
        ids_P,
        before_LE,
        order.starts_E,
        order.pair_of_P,
        order.slot_of_P,
        pairs,
        E=experts,
        BP=_SORT_PAIRS,
        **_FUSED,
    )
    return order


def _gate_up(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    order: Sorted,
    top_k: int,
    config: Config,
    emulate_bf16: bool,
) -> Tensor:
    model, width = weights.sizes(layout)
    matrix, bias, tile = weights.gate_up, weights.gate_up_bias, config.first
    stride_e, stride_p, stride_d = _strides(matrix, layout)
    step, up = (2, 1) if layout.interleaved else (1, width)
    bias_e, bias_p = (0, 0) if bias is None else bias.stride()
    h_PF = torch.empty(len(order.pair_of_P), width, dtype=x_TD.dtype, device=x_TD.device)
    blocks = len(order.expert_B)
    triton_products.gate_up[blocks * triton.cdiv(width, tile.n),](
        x_TD,
        matrix,
        matrix if bias is None else bias,
        h_PF,
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
        TOP_K=top_k,
        D=model,
        F=width,
        GATED=layout.gated,
        INTERLEAVED=layout.interleaved,
        BIAS=bias is not None,
        ACTIVATION=layout.activation,
        ALPHA=layout.alpha,
        LIMIT=layout.limit,
        ROUND=emulate_bf16,
        BM=config.rows,
        BN=tile.n,
        BK=tile.k,
        GROUP=config.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_FUSED,
    )
    return h_PF


def _down(
    h_PF: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    order: Sorted,
    config: Config,
    saliency: bool,
    emulate_bf16: bool,
) -> tuple[Tensor, Tensor]:
    model, width = weights.sizes(layout)
    matrix, bias, tile = weights.down, weights.down_bias, config.second
    stride_e, stride_d, stride_f = _strides(matrix, layout)
    bias_e, bias_d = (0, 0) if bias is None else bias.stride()
    pairs, columns = len(h_PF), triton.cdiv(model, tile.n)
    y_PD = torch.empty(pairs, model, dtype=h_PF.dtype, device=h_PF.device)
    squares_NP = h_PF.new_empty(columns if saliency else 0, pairs, dtype=torch.float32)
    blocks = len(order.expert_B)
    triton_products.down[blocks * columns,](
        h_PF,
        matrix,
        matrix if bias is None else bias,
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
        D=model,
        F=width,
        BIAS=bias is not None,
        SALIENCY=saliency,
        ROUND=emulate_bf16,
        BM=config.rows,
        BN=tile.n,
        BK=tile.k,
        GROUP=config.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_FUSED,
    )
    return y_PD, squares_NP


def _combine(
    y_PD: Tensor, gates_P: Tensor, order: Sorted, out_TD: Tensor, top_k: int, emulate_bf16: bool
) -> None:
    tokens, model = out_TD.shape
    step = min(1024, triton.next_power_of_2(model))
    triton_combine.combine[tokens * triton.cdiv(model, step),](
        y_PD,
        gates_P,
        order.slot_of_P,
        out_TD,
        TOP_K=top_k,
        D=model,
        ROUND=emulate_bf16,
        BD=step,
        **_FUSED,
    )


def _add_saliency(squares_NP: Tensor, gates_P: Tensor, order: Sorted, saliency: Saliency) -> None:
    columns, pairs = squares_NP.shape
    experts = len(order.totals_E)
    triton_combine.add_saliency[experts,](
        squares_NP,
        gates_P,
        order.pair_of_P,
        order.starts_E,
        order.totals_E,
        saliency.table_6E,
        pairs,
        E=experts,
        COLUMNS=columns,
        BP=256,
        **_FUSED,
    )


def _strides(matrix: Tensor, layout: ExpertLayout) -> tuple[int, int, int]:
    """Of experts, outputs, inputs."""
    stride_e, stride_out, stride_in = matrix.stride()
    if layout.transposed:
        stride_out, stride_in = stride_in, stride_out
    return stride_e, stride_out, stride_in
