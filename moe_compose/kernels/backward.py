# mypy: disable-error-code="import-untyped"
"""The experts with gradients: the forward's kernels in an autograd function.

The backward forms what is asked for (`gradients.py`): with frozen experts no weight gradient exists
at any time. Kept between the two are the inputs, the order of the pairs, and s·A_1 x of adapters;
z = (gate, up) only if asked for, else it is computed again.

Shape suffixes: T tokens, D model, E experts, K top-k, P pairs = T·K.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_compose.kernels import triton_forward
from moe_compose.kernels.gradients import LORA, NAMES, WEIGHTS, Call, Layer, gradients
from moe_compose.kernels.launch_products import Plan
from moe_compose.kernels.launch_sort import Sorted
from moe_compose.kernels.layout import ExpertWeights
from moe_compose.kernels.lora import ExpertLora


def moe_forward(
    x_TD: Tensor,
    weights: ExpertWeights,
    experts_TK: Tensor,
    weights_TK: Tensor,
    call: Call,
    lora: ExpertLora | None = None,
) -> Tensor:
    """`triton_forward.moe_forward`, differentiable in x, g, the experts, and `lora`.

    Adapters of another dtype than the tokens' are cast to it, as autocast does.
    """
    lora = (lora or ExpertLora()).map(lambda t: t.to(x_TD.dtype))
    call = replace(call, scale=lora.scale, save_z=call.save_z and torch.is_grad_enabled())
    given = [getattr(weights, n) for n in WEIGHTS] + [getattr(lora, n) for n in LORA]
    y_TD: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        call, experts_TK, x_TD, weights_TK, *given
    )
    return y_TD


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        experts_TK: Tensor,
        x_TD: Tensor,
        weights_TK: Tensor,
        *given: Tensor | None,
    ) -> Tensor:
        weights, lora = _bound(call, given)
        y_TD, trace = triton_forward.traced(
            x_TD,
            weights,
            call.layout,
            experts_TK,
            weights_TK,
            dtype=call.dtype,
            saliency=call.saliency,
            lora=lora,
            config=call.config,
            emulate_bf16=call.emulate_bf16,
            save_z=call.save_z,
        )
        ctx.call, ctx.gates_dtype, ctx.cut = call, weights_TK.dtype, None
        kept: tuple[Tensor | None, ...] = ()
        if trace is not None:
            order, *cut = trace.plan
            ctx.cut, ctx.config = cut, trace.config
            kept = (trace.gates_P, trace.z_PP, trace.u_PR, *order)
        ctx.save_for_backward(experts_TK, x_TD, *given, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        experts_TK, x_TD, *rest = ctx.saved_tensors
        given, kept = rest[: len(NAMES) - 2], rest[len(NAMES) - 2 :]
        needed = zip(NAMES, ctx.needs_input_grad[2:], strict=True)
        wanted = frozenset(name for name, needs in needed if needs)
        if ctx.cut is None:
            gates_TK = x_TD.new_zeros(experts_TK.shape, dtype=ctx.gates_dtype)
            inputs = zip(NAMES, (x_TD, gates_TK, *given), strict=True)
            return (None, None, *(torch.zeros_like(t) if n in wanted else None for n, t in inputs))
        gates_P, z_PP, u_PR, *order = kept
        plan = Plan(Sorted(*order), *ctx.cut)
        trace = triton_forward.Trace(plan, ctx.config, gates_P, z_PP, u_PR)
        with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
            layer = Layer.of(ctx.call, x_TD, experts_TK, *_bound(ctx.call, given), trace)
            found = gradients(dout_TD, layer, wanted, ctx.gates_dtype)
        return (None, None, *(found.get(name) for name in NAMES))


def _bound(call: Call, given: Any) -> tuple[ExpertWeights, ExpertLora]:
    named = dict(zip(NAMES[2:], given, strict=True))
    weights = ExpertWeights(**{name: named[name] for name in WEIGHTS})
    return weights, ExpertLora(**{name: named[name] for name in LORA}, scale=call.scale)
