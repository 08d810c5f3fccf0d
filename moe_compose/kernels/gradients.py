# mypy: disable-error-code="import-untyped"
"""Which kernels make which gradient of the experts.

What nobody wants is not formed. With z = (gate, up), h and y as in `layout.py`, g the router's
weight and dO a token's gradient:

    x, router   z again if it was not kept, dh' = W_2ᵀ dO, d(g) = dh'·h + dO·b_2,
                dz = act'(z) g dh', W_1ᵀ dz, and its sum per token
    experts     dW_2 = Σ dO (g h)ᵀ, dW_1 = Σ dz xᵀ, db_2 = Σ g dO, db_1 = Σ dz
    LoRA        v = s·B_2ᵀ dO before dh', u = s·B_1ᵀ dz before dX; dA_1 = Σ u xᵀ, dA_2 = Σ v (g h)ᵀ,
                dB_1 = s Σ dz (A_1 x)ᵀ, dB_2 = s Σ dO (A_2 g h)ᵀ

The first line is two thirds more work than a forward, or as much as one where z was kept. Nothing
here asks the device for a value, and there are no atomics: the same bytes in every run.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K, R rank; the
second P of z and dz is 2F if gated, F otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_compose.errors import OptionError
from moe_compose.kernels.backward_configs import BackwardConfig, backward_config_for
from moe_compose.kernels.configs import Config, arch_of
from moe_compose.kernels.launch_backward import (
    Hidden,
    bias_gradient,
    gate_gradient,
    hidden_gradient,
    weight_gradient,
)
from moe_compose.kernels.launch_products import LowRank, Plan, down, gate_up, oriented, project
from moe_compose.kernels.launch_sort import cut_again
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.saliency import Saliency
from moe_compose.kernels.triton_forward import Trace, combine

#: The differentiable arguments, in the order in which autograd sees them.
WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")
LORA = ("gate_up_a", "gate_up_b", "down_a", "down_b")
NAMES = ("x", "gates", *WEIGHTS, *LORA)

#: What dz, and what g·h is needed for.
_OF_Z = frozenset({"x", "gate_up", "gate_up_bias", "gate_up_a", "gate_up_b"})
_OF_H = frozenset({"down", "down_a", "down_b"})


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call is besides its differentiable tensors.

    Attributes:
        layout, dtype, saliency, config, emulate_bf16: as in `triton_forward.moe_forward`.
        scale: of the low-rank additions.
        backward_config: tiles of the backward; by the table if None.
        save_z: keep z from the forward, P·2F elements, instead of computing it again.
    """

    layout: ExpertLayout
    dtype: torch.dtype | None = None
    saliency: Saliency | None = None
    config: Config | None = None
    emulate_bf16: bool = False
    scale: float = 1.0
    backward_config: BackwardConfig | None = None
    save_z: bool = False


class Layer(NamedTuple):
    """A forward as its backward finds it, and how the backward is cut."""

    call: Call
    x_TD: Tensor  # noqa: N815
    experts_TK: Tensor  # noqa: N815
    weights: ExpertWeights
    lora: ExpertLora
    trace: Trace
    plan: Plan
    config: BackwardConfig

    @classmethod
    def of(
        cls,
        call: Call,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights: ExpertWeights,
        lora: ExpertLora,
        trace: Trace,
    ) -> Layer:
        """With the backward's tiles, and the sorted pairs cut for them."""
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        arch, rows = arch_of(x_TD.device), experts_TK.numel() / weights.experts
        config = call.backward_config or backward_config_for(
            arch, rows, x_TD.element_size(), *weights.sizes(call.layout)
        )
        if config is None:
            raise OptionError(
                f"no tiles of the backward are known for {arch}", hint="Use the eager reference."
            )
        plan = trace.plan
        order = plan.order if config.rows == plan.rows else cut_again(plan.order, config.rows)
        plan = plan._replace(order=order, rows=config.rows, group=config.group)
        return cls(call, x_TD, experts_TK, weights, lora, trace, plan, config)

    @property
    def layout(self) -> ExpertLayout:
        """The call's."""
        return self.call.layout


def gradients(
    dout_TD: Tensor, layer: Layer, wanted: frozenset[str], gates_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The wanted ones of `NAMES`."""
    dout_TD = dout_TD.to(layer.x_TD.dtype).contiguous()
    gates_P, bias_ED, plan = layer.trace.gates_P, layer.weights.down_bias, layer.plan
    found: dict[str, Tensor] = {}
    if "down_bias" in wanted and bias_ED is not None:
        found["down_bias"] = torch.empty_like(bias_ED)
        bias_gradient(dout_TD, gates_P, found["down_bias"], plan, routed=True)
    if wanted <= {"down_bias"}:
        return found
    v_PR = _narrow_gradient(dout_TD, layer.lora.down_b, layer, gather=True)
    hidden = _hidden(dout_TD, layer, v_PR, wanted)
    if "gates" in wanted:
        ids, parts_NP = layer.experts_TK, hidden.parts_NP
        found["gates"] = gate_gradient(parts_NP, dout_TD, bias_ED, ids, plan, gates_dtype)
    if wanted & _OF_H:
        found |= _second(dout_TD, hidden.h_PF, v_PR, layer, wanted)
    if wanted & _OF_Z:
        found |= _first(hidden.dz_PP, layer, wanted)
    return found


def _narrow_gradient(
    rows: Tensor, b_EPR: Tensor | None, layer: Layer, *, gather: bool = False
) -> Tensor | None:
    """`s · Bᵀ` of a gradient: what arrives between A and B."""
    if b_EPR is None:
        return None
    scale, tile = layer.lora.scale, layer.config.hidden
    return project(rows, b_EPR.mT, scale, layer.plan, tile, gather=gather)


def _z_again(layer: Layer) -> Tensor:
    """The forward's first product, of which only z is stored."""
    trace, lora = layer.trace, layer.lora
    low_rank = None
    if trace.u_PR is not None and lora.gate_up_b is not None:
        low_rank = LowRank(trace.u_PR, lora.gate_up_b)
    _, z_PP = gate_up(
        layer.x_TD,
        layer.weights,
        layer.layout,
        trace.plan,
        trace.config.first,
        low_rank,
        save_h=False,
        save_z=True,
    )
    return z_PP


def _hidden(dout_TD: Tensor, layer: Layer, v_PR: Tensor | None, wanted: frozenset[str]) -> Hidden:
    """All that follows from dh'. dz takes z's place, unless z may be wanted once more."""
    kept_PP, lora = layer.trace.z_PP, layer.lora
    z_PP = _z_again(layer) if kept_PP is None else kept_PP
    dz_PP = z_PP if kept_PP is None else torch.empty_like(z_PP)
    low_rank = None if v_PR is None or lora.down_a is None else LowRank(v_PR, lora.down_a.mT)
    return hidden_gradient(
        dout_TD,
        layer.weights,
        layer.layout,
        z_PP,
        layer.trace.gates_P,
        layer.plan,
        layer.config,
        low_rank,
        dz=dz_PP if wanted & _OF_Z else None,
        hidden=bool(wanted & _OF_H),
        gates="gates" in wanted,
    )


def _second(
    dout_TD: Tensor, h_PF: Tensor, v_PR: Tensor | None, layer: Layer, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of what multiplies h, which comes weighted."""
    found: dict[str, Tensor] = {}
    lora, plan, config = layer.lora, layer.plan, layer.config
    if "down" in wanted:
        found["down"] = torch.empty_like(layer.weights.down)
        out_EDF = oriented(found["down"], layer.layout)
        weight_gradient(dout_TD, h_PF, out_EDF, plan, config, gather_a=True)
    if "down_a" in wanted and lora.down_a is not None and v_PR is not None:
        found["down_a"] = torch.empty_like(lora.down_a)
        weight_gradient(v_PR, h_PF, found["down_a"], plan, config)
    if "down_b" in wanted and lora.down_a is not None and lora.down_b is not None:
        found["down_b"] = torch.empty_like(lora.down_b)
        u_PR = project(h_PF, lora.down_a, lora.scale, plan, config.hidden)
        weight_gradient(dout_TD, u_PR, found["down_b"], plan, config, gather_a=True)
    return found


def _first(dz_PP: Tensor, layer: Layer, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Gradients of what z is made of."""
    found: dict[str, Tensor] = {}
    x_TD, weights, lora, trace = layer.x_TD, layer.weights, layer.lora, layer.trace
    plan, config = layer.plan, layer.config
    between = wanted & {"x", "gate_up_a"}
    du_PR = _narrow_gradient(dz_PP, lora.gate_up_b, layer) if between else None
    if "x" in wanted:
        found["x"] = _input_gradient(dz_PP, du_PR, layer)
    if "gate_up" in wanted:
        found["gate_up"] = torch.empty_like(weights.gate_up)
        out_EPD = oriented(found["gate_up"], layer.layout)
        weight_gradient(dz_PP, x_TD, out_EPD, plan, config, gather_b=True)
    if "gate_up_bias" in wanted and weights.gate_up_bias is not None:
        found["gate_up_bias"] = torch.empty_like(weights.gate_up_bias)
        bias_gradient(dz_PP, trace.gates_P, found["gate_up_bias"], plan)
    if "gate_up_a" in wanted and lora.gate_up_a is not None and du_PR is not None:
        found["gate_up_a"] = torch.empty_like(lora.gate_up_a)
        weight_gradient(du_PR, x_TD, found["gate_up_a"], plan, config, gather_b=True)
    if "gate_up_b" in wanted and lora.gate_up_b is not None and trace.u_PR is not None:
        found["gate_up_b"] = torch.empty_like(lora.gate_up_b)
        weight_gradient(dz_PP, trace.u_PR, found["gate_up_b"], plan, config)
    return found


def _input_gradient(dz_PP: Tensor, du_PR: Tensor | None, layer: Layer) -> Tensor:
    """`Σ_j W_1ᵀ dz_tj`: rows in slot order, then their sum per token in fp32; g is in dz."""
    lora, plan = layer.lora, layer.plan
    matrix_EDP = oriented(layer.weights.gate_up, layer.layout).mT
    low_rank = None
    if du_PR is not None and lora.gate_up_a is not None:
        low_rank = LowRank(du_PR, lora.gate_up_a.mT)
    dx_PD, _ = down(dz_PP, matrix_EDP, None, plan, layer.config.input, low_rank)
    dx_TD = torch.empty_like(layer.x_TD, memory_format=torch.contiguous_format)
    ones_P = torch.ones_like(layer.trace.gates_P)
    combine(dx_PD, ones_P, plan.order, dx_TD, plan.top_k, plan.emulate_bf16)
    return dx_TD
