"""Which implementation runs a layer, and why; and the function that runs it.

Shape suffixes: T tokens, D model, K top-k.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from moe_compose.errors import OptionError
from moe_compose.kernels import reference
from moe_compose.kernels.configs import HALF, arch_of
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.saliency import Saliency

log = logging.getLogger(__name__)

#: `auto` is Triton wherever it can run on an accelerator, eager otherwise.
Implementation = Literal["auto", "triton", "eager"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs a layer.

    Attributes:
        implementation: `triton` or `eager`.
        reason: in words.
    """

    implementation: Literal["triton", "eager"]
    reason: str


def choose(
    x_TD: Tensor,
    weights: ExpertWeights,
    weights_TK: Tensor,
    *,
    implementation: Implementation = "auto",
    dtype: torch.dtype | None = None,
) -> Choice:
    """What `moe_forward` runs these tensors with.

    Args:
        x_TD: the tokens.
        weights: the experts.
        weights_TK: the router's weights.
        implementation: what was asked for.
        dtype: of the result.

    Raises:
        OptionError: Triton was asked for and cannot run them.
    """
    if implementation == "eager":
        return Choice(implementation="eager", reason="as asked")
    if implementation == "auto" and x_TD.device.type == "cpu":
        return Choice(implementation="eager", reason="the tensors are on the CPU")
    obstacle = _obstacle(x_TD, weights, weights_TK, dtype)
    if implementation == "triton":
        if obstacle:
            raise OptionError(
                f"Triton cannot run this layer: {obstacle}",
                hint="Pass implementation='auto' to fall back to the eager reference.",
            )
        return Choice(implementation="triton", reason="as asked")
    if obstacle:
        return Choice(implementation="eager", reason=obstacle)
    return Choice(implementation="triton", reason=f"tiles are known for {arch_of(x_TD.device)}")


def moe_forward(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    dtype: torch.dtype | None = None,
    saliency: Saliency | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """`y_t = Σ_j g_tj · f_{e_tj}(x_t)`: the routed experts of one layer, on routed tokens only.

    Args:
        x_TD: the tokens, `[T, D]`.
        weights: the experts' tensors.
        layout: how they lie, and the activation.
        experts_TK: chosen experts, `[T, K]`; ids outside `0..E-1` count for nothing.
        weights_TK: what each one's output is multiplied by.
        dtype: of the result; that of `x_TD` if not given.
        saliency: sums that this call's pairs are added to.
        implementation: see `Implementation`. Which one ran, and why, is logged once per reason.

    Returns:
        `[T, D]`.

    Raises:
        OptionError: shapes that don't fit, or Triton was asked for and cannot run them.
    """
    choice = choose(x_TD, weights, weights_TK, implementation=implementation, dtype=dtype)
    _say(choice)
    if choice.implementation == "eager":
        return reference.moe_forward(
            x_TD, weights, layout, experts_TK, weights_TK, dtype=dtype, saliency=saliency
        )
    from moe_compose.kernels import triton_forward

    return triton_forward.moe_forward(
        x_TD, weights, layout, experts_TK, weights_TK, dtype=dtype, saliency=saliency
    )


def _obstacle(
    x_TD: Tensor, weights: ExpertWeights, weights_TK: Tensor, dtype: torch.dtype | None
) -> str:
    """Why Triton cannot run these tensors; empty if it can."""
    given = (x_TD, weights_TK, *weights.tensors)
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "gradients are wanted, and the kernels have no backward yet"
    if torch.float64 in (dtype, x_TD.dtype):
        return "fp64 is for the reference"
    if x_TD.dtype not in _DTYPES:
        return f"no kernels for {x_TD.dtype}"
    if any(t.dtype != x_TD.dtype for t in weights.tensors):
        return f"tokens are {x_TD.dtype} and experts {weights.down.dtype}"
    if x_TD.device.type == "cpu":
        return _cpu_obstacle(x_TD.dtype)
    if x_TD.device.type != "cuda":
        return f"no kernels for {x_TD.device.type}"
    arch = arch_of(x_TD.device)
    return "" if arch in HALF else f"no tiles are known for {arch}"


def _cpu_obstacle(dtype: torch.dtype) -> str:
    from moe_compose.kernels import triton_forward

    if not triton_forward.INTERPRETED:
        return "the tensors are on the CPU, and Triton was not imported as its interpreter"
    return "" if dtype == torch.float32 else f"{dtype} is wrong in Triton's interpreter"


@cache
def _say(choice: Choice) -> None:
    log.info("experts run with %s: %s", choice.implementation, choice.reason)
