"""The kernels as an experts implementation of transformers 5.

transformers gives every family's stacked experts one interface: flags on the module say how its
matrices lie, `_apply_gate` is what it does between them. A flag is taken at its word. What
`_apply_gate` computes is found by asking it: it is run on a few numbers, and compared with the
layouts that its attributes suggest. Nothing is known of families here.

Shape suffixes: T tokens, D model, K top-k.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.kernels.choice import Implementation, check_implementation, moe_forward
from moe_compose.kernels.layout import ACTIVATIONS, ExpertLayout, ExpertWeights
from moe_compose.kernels.reference import activate

log = logging.getLogger(__name__)

NAME = "moe_compose_triton"

#: Attributes of experts modules that hold `ExpertLayout.limit` and `.alpha`.
_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")


def register(*, implementation: Implementation = "auto") -> str:
    """Make the kernels known to transformers as `"moe_compose_triton"`.

    A layer that none of our layouts describes goes to transformers' `grouped_mm`, and the reason is
    logged once; if an implementation was asked for it is an error.

    Args:
        implementation: as in `moe_forward`.

    Returns:
        The name, for `model.set_experts_implementation(name)`.

    Example:
        >>> model.set_experts_implementation(register())  # doctest: +SKIP
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    check_implementation(implementation)
    ALL_EXPERTS_FUNCTIONS.register(NAME, partial(_experts_forward, implementation))
    return NAME


def _experts_forward(
    implementation: Implementation,
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    try:
        layout = layout_of(module)
    except UnsupportedError as e:
        if implementation != "auto":
            raise
        _say(type(module).__name__, e.message)
        from transformers.integrations.moe import grouped_mm_experts_forward

        y_TD: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return y_TD
    return moe_forward(
        hidden_states,
        weights_of(module),
        layout,
        top_k_index,
        top_k_weights,
        implementation=implementation,
    )


def weights_of(module: Any) -> ExpertWeights:
    """The tensors of a transformers experts module."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biased = module.has_bias
    return ExpertWeights(
        gate_up=getattr(module, first),
        down=module.down_proj,
        gate_up_bias=getattr(module, f"{first}_bias") if biased else None,
        down_bias=module.down_proj_bias if biased else None,
    )


def layout_of(module: Any) -> ExpertLayout:
    """The layout of a transformers experts module, kept on the module: finding it waits for the
    device.

    Raises:
        UnsupportedError: it does something that no layout describes.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError("a norm follows each expert")
    known: ExpertLayout | str | None = module.__dict__.get("_moe_compose_layout")
    if known is None:
        known = module.__dict__["_moe_compose_layout"] = _recognise(module)
    if isinstance(known, str):
        raise UnsupportedError(known)
    return known


def _recognise(module: Any) -> ExpertLayout | str:
    """The first layout that computes what the module does on a probe; else, what is the matter."""
    limit = next((getattr(module, n) for n in _LIMITS if hasattr(module, n)), None)
    alpha = next((getattr(module, n) for n in _ALPHAS if hasattr(module, n)), 1.0)
    generator = torch.Generator().manual_seed(0)
    reach = 8.0 if limit is None else 4 * float(limit)
    probe_NP = torch.randn(64, 16, generator=generator, dtype=torch.float64, device="cpu")
    probe_NP = reach * probe_NP.to(module.down_proj.device)
    computed = (module._apply_gate if module.has_gate else module.act_fn)(probe_NP)
    for activation in ACTIVATIONS:
        for bound in (limit, None):
            try:
                layout = ExpertLayout(
                    gated=module.has_gate,
                    interleaved=module.has_gate and not module.is_concatenated,
                    transposed=module.is_transposed,
                    activation=activation,
                    alpha=float(alpha),
                    limit=None if bound is None else float(bound),
                )
            except OptionError:
                continue
            ours = activate(probe_NP, layout)
            if ours.shape == computed.shape and torch.allclose(ours, computed.to(ours.dtype)):
                return layout
    what = "_apply_gate" if module.has_gate else "act_fn"
    return f"what its {what} computes is none of the known activations"


@cache
def _say(module: str, reason: str) -> None:
    log.info("%s runs with transformers' grouped_mm: %s", module, reason)
