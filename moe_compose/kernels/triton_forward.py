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
from moe_compose.kernels import triton_combine
from moe_compose.kernels.configs import Config, arch_of, config_for
from moe_compose.kernels.launch_products import LowRank, Plan, down, gate_up, oriented, project
from moe_compose.kernels.launch_saliency import add_saliency
from moe_compose.kernels.launch_sort import FUSED, Sorted, sort_pairs
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights, check
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.saliency import Saliency

#: Whether kernels run in Triton's interpreter; fixed when triton is first imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Trace(NamedTuple):
    """What a forward leaves for its backward.

    Attributes:
        plan, config: how the forward was cut.
        gates_P: the weights, flat, in fp32.
        z_PP: gate and up of every slot, if they were to be saved.
        u_PR: s·A_1 x, if there is a low-rank addition.
    """

    plan: Plan
    config: Config
    gates_P: Tensor  # noqa: N815
    z_PP: Tensor | None = None  # noqa: N815
    u_PR: Tensor | None = None  # noqa: N815


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
    config: Config | None = None,
    emulate_bf16: bool = False,
) -> Tensor:
    """The reference's `moe_forward` on an accelerator, or in Triton's interpreter.

    Args:
        x_TD: the tokens; bf16, fp16 or fp32. No gradients: `backward.moe_forward` has them.
        weights: the experts, in the same dtype.
        layout: how they lie.
        experts_TK: ids; those outside `0..E-1` count for nothing.
        weights_TK: g.
        dtype: of the result; that of `x_TD` if not given.
        saliency: sums to add this call's pairs to.
        lora: low-rank additions, in the same dtype.
        config: tiles; by the table if not given.
        emulate_bf16: the tensors are fp32 and hold bf16 values: round what a bf16 layer rounds.

    Returns:
        `[T, D]`.

    Raises:
        OptionError: shapes that don't fit, or a device that the table lacks.
    """
    y_TD, _ = traced(
        x_TD,
        weights,
        layout,
        experts_TK,
        weights_TK,
        dtype=dtype,
        saliency=saliency,
        lora=lora,
        config=config,
        emulate_bf16=emulate_bf16,
    )
    return y_TD


def traced(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    dtype: torch.dtype | None = None,
    saliency: Saliency | None = None,
    lora: ExpertLora | None = None,
    config: Config | None = None,
    emulate_bf16: bool = False,
    save_z: bool = False,
) -> tuple[Tensor, Trace | None]:
    """`moe_forward`, and what its backward needs; None where there are no pairs."""
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency, lora)
    tokens, top_k = experts_TK.shape
    out_TD = torch.empty_like(
        x_TD, dtype=dtype or x_TD.dtype, memory_format=torch.contiguous_format
    )
    if not experts_TK.numel():
        return out_TD.zero_(), None
    config = config or _config(x_TD, weights, layout, tokens * top_k)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    gates_P = weights_TK.float().flatten().contiguous()  # a [T, 1] slice flattens to a strided view
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        order = sort_pairs(experts_TK, weights.experts, config.rows)
        plan = Plan(order, config.rows, config.group, top_k, emulate_bf16)
        low_rank = _added_to_z(x_TD, lora, plan, config)
        h_PF, z_PP = gate_up(x_TD, weights, layout, plan, config.first, low_rank, save_z=save_z)
        y_PD, squares_NP = down(
            h_PF,
            oriented(weights.down, layout),
            weights.down_bias,
            plan,
            config.second,
            _added_to_y(h_PF, lora, plan, config),
            saliency=saliency is not None,
        )
        combine(y_PD, gates_P, order, out_TD, top_k, emulate_bf16)
        if saliency is not None:
            add_saliency(squares_NP, gates_P, order, saliency)
    u_PR = None if low_rank is None else low_rank.rows_PR
    return out_TD, Trace(plan, config, gates_P, z_PP if save_z else None, u_PR)


def moe_saliency(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    saliency: Saliency,
    *,
    lora: ExpertLora | None = None,
    config: Config | None = None,
    emulate_bf16: bool = False,
) -> None:
    """The saliency of a `moe_forward` whose output nobody wants.

    The second product keeps each row's part of ‖f‖² per tile of columns, and drops the tile: h is
    stored, `[P, F]`, but nothing `[P, D]` or `[T, D]`.

    Raises:
        OptionError: as `moe_forward`.
    """
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency, lora)
    if not experts_TK.numel():
        return
    lora = lora and lora.map(lambda t: t.to(x_TD.dtype))
    config = config or _config(x_TD, weights, layout, experts_TK.numel())
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    gates_P = weights_TK.float().flatten().contiguous()
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        order = sort_pairs(experts_TK, weights.experts, config.rows)
        plan = Plan(order, config.rows, config.group, experts_TK.shape[1], emulate_bf16)
        low_rank = _added_to_z(x_TD, lora, plan, config)
        h_PF, _ = gate_up(x_TD, weights, layout, plan, config.first, low_rank)
        _, squares_NP = down(
            h_PF,
            oriented(weights.down, layout),
            weights.down_bias,
            plan,
            config.second,
            _added_to_y(h_PF, lora, plan, config),
            saliency=True,
            save_y=False,
        )
        add_saliency(squares_NP, gates_P, order, saliency)


def _config(x_TD: Tensor, weights: ExpertWeights, layout: ExpertLayout, pairs: int) -> Config:
    arch, rows = arch_of(x_TD.device), pairs / weights.experts
    config = config_for(arch, rows, x_TD.element_size(), *weights.sizes(layout))
    if config is None:
        raise OptionError(
            f"no tiles are known for {arch}", hint="Pass config=, or use the eager reference."
        )
    return config


def _added_to_z(
    x_TD: Tensor, lora: ExpertLora | None, plan: Plan, config: Config
) -> LowRank | None:
    if lora is None or lora.gate_up_a is None or lora.gate_up_b is None:
        return None
    u_PR = project(x_TD, lora.gate_up_a, lora.scale, plan, config.second, gather=True)
    return LowRank(u_PR, lora.gate_up_b)


def _added_to_y(
    h_PF: Tensor, lora: ExpertLora | None, plan: Plan, config: Config
) -> LowRank | None:
    if lora is None or lora.down_a is None or lora.down_b is None:
        return None
    return LowRank(project(h_PF, lora.down_a, lora.scale, plan, config.second), lora.down_b)


def combine(
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
        **FUSED,
    )
