"""The router of one MoE layer, run: one Triton kernel where it can, else the routing reference.

`moe_compose.routing` says what is computed. The kernel does it in one pass over the logits instead
of the reference's 6 to 25 launches, in fp32. Experts are those of the reference in fp32, ties
included; weights differ by rounding.

Shape suffixes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_compose import routing as reference
from moe_compose.architectures.routing_form import Routing
from moe_compose.errors import OptionError
from moe_compose.kernels.choice import check_implementation
from moe_compose.kernels.configs import HALF, arch_of
from moe_compose.routing import Routed

log = logging.getLogger(__name__)

#: `auto` is Triton wherever it can run on an accelerator, eager otherwise.
RouterImplementation = Literal["auto", "triton", "eager"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Logits that a program holds; more than so many per warp would not stay in registers.
_PER_PROGRAM = 512


def route(
    logits_TE: Tensor,
    routing: Routing,
    top_k: int,
    *,
    correction_bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    chosen_TK: Tensor | None = None,
    implementation: RouterImplementation = "auto",
) -> Routed:
    """`moe_compose.routing.route`, by a kernel where there is one for these tensors.

    Differentiable in the logits, through the weights, as the reference is.

    Args:
        logits_TE: router logits `[T, E]`, the router's bias included.
        routing: the scheme.
        top_k: experts per token, K.
        correction_bias_E: `[E]`, with `routing.selection_bias`.
        expert_scale_E: `[E]`, with `routing.expert_scale`.
        chosen_TK: experts chosen by something else, which the logits only weigh. That they exist is
            checked, which waits for the device.
        implementation: `triton`, `eager`, or whichever fits. Which one ran, and why, is logged once
            per reason.

    Returns:
        Weights (fp32; fp64 for fp64 logits) and experts (int64), `[T, K]` each.

    Raises:
        OptionError: as the reference; or Triton was asked for and cannot run them.

    Example:
        >>> routed = route(torch.tensor([[0.0, 2.0, 1.0]]), Routing(score="topk_softmax"), 2)
        >>> routed.experts_TK                                    # [T=1, K=2]
        tensor([[1, 2]])
    """
    tensors = (correction_bias_E, expert_scale_E, chosen_TK)
    ran, reason = _choose(logits_TE, routing, expert_scale_E, implementation)
    _say(ran, reason)
    misfits = (
        *reference.size_problems(logits_TE, routing, top_k),
        *reference.tensor_problems(logits_TE, routing, top_k, *tensors),
    )
    if ran == "eager" or misfits or not len(logits_TE):  # misfits: the reference raises them
        return reference.route(
            logits_TE,
            routing,
            top_k,
            correction_bias_E=correction_bias_E,
            expert_scale_E=expert_scale_E,
            chosen_TK=chosen_TK,
        )
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    weights_TK, experts_TK = _Route.apply(logits_TE, *tensors, routing, top_k)  # type: ignore[no-untyped-call]
    return Routed(weights_TK, experts_TK)


def _choose(
    logits_TE: Tensor, routing: Routing, expert_scale_E: Tensor | None, asked: RouterImplementation
) -> tuple[Literal["triton", "eager"], str]:
    """What runs, and why."""
    check_implementation(asked, get_args(RouterImplementation))
    if asked == "eager":
        return "eager", "as asked"
    if asked == "auto" and logits_TE.device.type == "cpu":
        return "eager", "the logits are on the CPU"
    obstacle = _obstacle(logits_TE, routing, expert_scale_E)
    if asked == "triton" and obstacle:
        raise OptionError(
            f"Triton cannot run this router: {obstacle}",
            hint="Pass implementation='auto' to fall back to the reference.",
        )
    if obstacle:
        return "eager", obstacle
    return "triton", "as asked" if asked == "triton" else "there is a kernel for it"


def _obstacle(logits_TE: Tensor, routing: Routing, expert_scale_E: Tensor | None) -> str:
    """Why Triton cannot run this router; empty if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if logits_TE.dtype not in _DTYPES:
        fp64 = logits_TE.dtype == torch.float64
        return "fp64 is for the reference" if fp64 else f"no kernel for {logits_TE.dtype}"
    if routing.norm_p is not None and not 1 <= routing.norm_p < math.inf:
        return f"the {routing.norm_p:g}-norm is for the reference"
    if expert_scale_E is not None and expert_scale_E.requires_grad and torch.is_grad_enabled():
        return "the expert scale wants a gradient, and the kernel has one for the logits only"
    if logits_TE.device.type == "cpu":
        return _cpu_obstacle(logits_TE.dtype)
    if logits_TE.device.type != "cuda":
        return f"no kernel for {logits_TE.device.type}"
    arch = arch_of(logits_TE.device)
    return "" if arch in HALF else f"the kernel has not been compiled for {arch}"


def _cpu_obstacle(dtype: torch.dtype) -> str:
    from moe_compose.kernels.triton_forward import INTERPRETED

    if not INTERPRETED:
        return "the logits are on the CPU, and Triton was not imported as its interpreter"
    return "" if dtype == torch.float32 else f"{dtype} is wrong in Triton's interpreter"


class _Route(torch.autograd.Function):
    """Launches the forward, and the backward when a gradient arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        scale_E: Tensor | None,
        chosen_TK: Tensor | None,
        routing: Routing,
        top_k: int,
    ) -> tuple[Tensor, Tensor]:
        from moe_compose.kernels import triton_router

        tokens, experts = logits_TE.shape
        weights_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.float32)
        experts_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int64)
        given = {
            "biased": bias_E is not None,
            "scaled": scale_E is not None,
            "given": chosen_TK is not None,
        }
        options = forward_options(routing, experts, top_k, **given)
        with torch.cuda.device_of(logits_TE):  # type: ignore[no-untyped-call]
            triton_router.forward[-(-tokens // options["BT"]),](
                logits_TE,
                logits_TE if bias_E is None else bias_E.contiguous(),
                logits_TE if scale_E is None else scale_E.contiguous(),
                experts_TK if chosen_TK is None else chosen_TK.contiguous(),
                weights_TK,
                experts_TK,
                tokens,
                logits_TE.stride(0),
                **options,
            )
        ctx.save_for_backward(logits_TE, scale_E, experts_TK)
        ctx.routing = routing
        ctx.mark_non_differentiable(experts_TK)
        return weights_TK, experts_TK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TK: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        from moe_compose.kernels import triton_router_backward

        logits_TE, scale_E, experts_TK = ctx.saved_tensors
        tokens, experts = logits_TE.shape
        options = backward_options(
            ctx.routing, experts, experts_TK.shape[1], scaled=scale_E is not None
        )
        grad_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(logits_TE):  # type: ignore[no-untyped-call]
            triton_router_backward.backward[-(-tokens // options["BT"]),](
                logits_TE,
                logits_TE if scale_E is None else scale_E.contiguous(),
                experts_TK,
                grad_TK.contiguous(),
                grad_TE,
                tokens,
                logits_TE.stride(0),
                **options,
            )
        return grad_TE, None, None, None, None, None


def forward_options(
    routing: Routing, experts: int, top_k: int, *, biased: bool, scaled: bool, given: bool
) -> dict[str, Any]:
    """What the forward is compiled for, and with."""
    groups = routing.groups if routing.grouped else 1
    padded = _padded(groups), _padded(experts // groups)
    return {
        **_scheme(routing, experts, top_k, scaled),
        "GROUPS": groups,
        "TOP_GROUPS": routing.top_groups,
        "GROUP_SCORE": routing.group_score,
        "BIASED": biased,
        "GIVEN": given,
        "BG": padded[0],
        "BP": padded[1],
        **_launch(padded[0] * padded[1]),
    }


def backward_options(routing: Routing, experts: int, top_k: int, *, scaled: bool) -> dict[str, Any]:
    """What the backward is compiled for, and with."""
    width = _padded(experts)
    return {**_scheme(routing, experts, top_k, scaled), "BE": width, **_launch(width)}


def _scheme(routing: Routing, experts: int, top_k: int, scaled: bool) -> dict[str, Any]:
    return {
        "E": experts,
        "TOP_K": top_k,
        "BK": _padded(top_k),
        "SCORE": routing.score,
        "RENORMALISE": routing.renormalise and routing.score != "topk_softmax",
        "EPSILON": routing.epsilon,
        "FLOOR": routing.floor,
        "NORM_P": None if routing.norm_p is None else float(routing.norm_p),
        "SCALE": routing.scale,
        "CAP": routing.softcap or None,
        "JITTER": routing.jitter,
        "SCALED": scaled,
    }


def _launch(columns: int) -> dict[str, Any]:
    """Rows per program, and its warps. One warp where it can be: it reduces without waiting."""
    return {
        "BT": max(1, _PER_PROGRAM // columns),
        "num_warps": min(8, max(1, columns // _PER_PROGRAM)),
        "enable_fp_fusion": True,
    }


def _padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


@cache
def _say(ran: str, reason: str) -> None:
    log.info("routers run with %s: %s", ran, reason)
