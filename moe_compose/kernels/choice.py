"""Which implementation runs a layer, and why; and the functions that run it.

Shape suffixes: T tokens, D model, K top-k.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_compose.errors import OptionError
from moe_compose.kernels import grouped, reference, selfcheck
from moe_compose.kernels.configs import HALF, arch_of
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.saliency import Saliency

log = logging.getLogger(__name__)

#: `auto` is Triton wherever it can run on an accelerator; else torch's `grouped_mm` where it can,
#: also on the CPU (per CPU second 0.9 to 2 times eager's speed, 1.7 to 30 times with gradients of
#: the experts; torch 2.13); else eager.
Implementation = Literal["auto", "triton", "grouped_mm", "eager"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs a layer.

    Attributes:
        implementation: `triton`, `grouped_mm` or `eager`.
        reason: in words.
    """

    implementation: Literal["triton", "grouped_mm", "eager"]
    reason: str


def choose(
    x_TD: Tensor,
    weights: ExpertWeights,
    *,
    implementation: Implementation = "auto",
    dtype: torch.dtype | None = None,
    lora: ExpertLora | None = None,
) -> Choice:
    """What `moe_forward` runs these tensors with.

    Args:
        x_TD: the tokens.
        weights: the experts.
        implementation: what was asked for.
        dtype: of the result.
        lora: low-rank additions to the experts.

    Raises:
        OptionError: what was asked for cannot run them.
    """
    check_implementation(implementation)
    if implementation == "eager":
        return Choice(implementation="eager", reason="as asked")
    if implementation == "triton":
        return _as_asked(implementation, _obstacle(x_TD, weights, dtype))
    if implementation == "grouped_mm":
        obstacle = grouped.obstacle(x_TD, weights, dtype=dtype, lora=lora)
        return _as_asked(implementation, obstacle)
    on_cpu = x_TD.device.type == "cpu"
    no_triton = "the tensors are on the CPU" if on_cpu else _obstacle(x_TD, weights, dtype)
    if not no_triton:
        return Choice(implementation="triton", reason=f"tiles are known for {arch_of(x_TD.device)}")
    no_grouped = grouped.obstacle(x_TD, weights, dtype=dtype, lora=lora)
    if not no_grouped:
        return Choice(implementation="grouped_mm", reason=no_triton)
    reasons = dict.fromkeys((no_triton, no_grouped))
    return Choice(implementation="eager", reason="; ".join(reasons))


def check_implementation(asked: str, known: tuple[str, ...] = get_args(Implementation)) -> None:
    """Refuse a word that names none.

    Raises:
        OptionError: so it is.
    """
    if asked not in known:
        raise OptionError(f"implementation ({asked!r}) is none of {', '.join(known)}")


def _as_asked(implementation: Literal["triton", "grouped_mm"], obstacle: str) -> Choice:
    if obstacle:
        name = "Triton" if implementation == "triton" else implementation
        raise OptionError(
            f"{name} cannot run this layer: {obstacle}",
            hint="Pass implementation='auto' to fall back to what can.",
        )
    return Choice(implementation=implementation, reason="as asked")


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
    save_z: bool = False,
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
        lora: low-rank additions to the experts.
        save_z: Triton's backward needs z = (gate, up): keep it, T·K·2F elements, instead of
            computing it again. The other implementations keep all that autograd wants.
        implementation: see `Implementation`. Which one ran, and why, is logged once per reason.

    Returns:
        `[T, D]`.

    Raises:
        OptionError: shapes that don't fit, or what was asked for cannot run them.
    """
    choice = choose(x_TD, weights, implementation=implementation, dtype=dtype, lora=lora)
    _say(choice)
    if choice.implementation != "triton":
        by_torch = grouped if choice.implementation == "grouped_mm" else reference
        y_TD: Tensor = by_torch.moe_forward(
            x_TD, weights, layout, experts_TK, weights_TK, dtype=dtype, saliency=saliency, lora=lora
        )
        return y_TD
    from moe_compose.kernels import backward
    from moe_compose.kernels.gradients import Call

    call = Call(layout=layout, dtype=dtype, saliency=saliency, save_z=save_z)
    return backward.moe_forward(x_TD, weights, experts_TK, weights_TK, call, lora)


def moe_saliency(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    saliency: Saliency,
    *,
    lora: ExpertLora | None = None,
    implementation: Implementation = "auto",
) -> None:
    """What `moe_forward` adds to `saliency`, without its output: for a layer that is only watched.

    Nothing `[T, D]` or `[T·K, D]` is stored; no gradients. Arguments are those of `moe_forward`.

    Raises:
        OptionError: as `moe_forward`.
    """
    choice = choose(x_TD, weights, implementation=implementation, lora=lora)
    _say(choice)
    given = (x_TD, weights, layout, experts_TK, weights_TK, saliency)
    if choice.implementation == "eager":
        reference.moe_saliency(*given, lora=lora)
    elif choice.implementation == "grouped_mm":
        grouped.moe_saliency(*given, lora=lora)
    else:
        from moe_compose.kernels import triton_forward

        triton_forward.moe_saliency(*given, lora=lora)


def _obstacle(x_TD: Tensor, weights: ExpertWeights, dtype: torch.dtype | None) -> str:
    """Why Triton cannot run these tensors; empty if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
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
    if arch not in HALF:
        return f"no tiles are known for {arch}"
    return selfcheck.obstacle(x_TD.device, x_TD.dtype)


def _cpu_obstacle(dtype: torch.dtype) -> str:
    from moe_compose.kernels import triton_forward

    if not triton_forward.INTERPRETED:
        return "the tensors are on the CPU, and Triton was not imported as its interpreter"
    return "" if dtype == torch.float32 else f"{dtype} is wrong in Triton's interpreter"


@cache
def _say(choice: Choice) -> None:
    log.info("experts run with %s: %s", choice.implementation, choice.reason)
