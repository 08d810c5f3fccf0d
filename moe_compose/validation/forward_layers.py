"""One layer's routed experts, run twice and held to fp64: by transformers' own eager loop, and by
the Triton kernels.

The module of the model itself is the reference, in fp64; so what is checked is the class's own
mathematics, not ours. Inputs are what the layer saw on real text, and probes for experts that the
text did not reach.

Shape suffixes: N tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_compose.kernels.hook import layout_of, weights_of
from moe_compose.validation.forward_report import Errors


class Routed(NamedTuple):
    """What reaches one layer's experts.

    Attributes:
        x_ND: tokens.
        experts_NK: the experts chosen for each.
        gates_NK: their weights.
    """

    x_ND: Tensor  # noqa: N815
    experts_NK: Tensor  # noqa: N815
    gates_NK: Tensor  # noqa: N815


def probes(routed: Routed, experts: int) -> Routed:
    """Tokens for the experts that `routed` does not reach: rows of it again, sent to them by hand.

    Args:
        routed: at least one token.
        experts: E.

    Returns:
        As many tokens as K slots each need; none when every expert is reached.

    Example:
        >>> some = Routed(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2))
        >>> probes(some, 5).experts_NK
        tensor([[2, 3],
                [4, 4]])
    """
    loads_E = torch.bincount(routed.experts_NK.flatten(), minlength=experts)[:experts]
    missing = torch.where(loads_E == 0)[0]
    top_k = routed.experts_NK.shape[1]
    rows = -(-len(missing) // top_k)
    if not rows:
        return Routed(*(t[:0] for t in routed))
    filled = torch.cat([missing, missing[-1:].expand(rows * top_k - len(missing))])
    again = torch.arange(rows, device=missing.device) % len(routed.x_ND)
    ids_NK = filled.reshape(rows, top_k).to(routed.experts_NK.dtype)
    return Routed(routed.x_ND[again], ids_NK, routed.gates_NK[again])


def only(routed: Routed, chosen: Tensor, experts: int) -> Routed:
    """The tokens that reach `chosen`, renumbered to them; a slot of another expert weighs 0.

    Args:
        routed: ids in 0..E-1.
        chosen: ids of experts, ascending.
        experts: E.
    """
    place_E = torch.full((experts,), -1, device=chosen.device)
    place_E[chosen] = torch.arange(len(chosen), device=chosen.device)
    ids_NK = place_E[routed.experts_NK.clamp(0, experts - 1)]
    ids_NK = ids_NK.masked_fill((routed.experts_NK < 0) | (routed.experts_NK >= experts), -1)
    kept = (ids_NK >= 0).any(-1)
    ids_NK = ids_NK[kept]
    gates_NK = routed.gates_NK[kept] * (ids_NK >= 0)
    first_N1 = ids_NK.max(-1, keepdim=True).values
    return Routed(routed.x_ND[kept], torch.where(ids_NK >= 0, ids_NK, first_N1), gates_NK)


def part_of(module: Any, chosen: Tensor, dtype: torch.dtype) -> Any:
    """A module of `chosen` experts alone, its weights in `dtype`, run by the class's own loop.

    Args:
        module: a transformers experts module; every parameter's first dimension is E.
        chosen: ids of experts.
        dtype: of the weights.
    """
    part = copy.copy(module)
    part.config = copy.copy(module.config)
    part.config._experts_implementation = "eager"
    part.num_experts = len(chosen)
    part._parameters = {
        name: None
        if weight is None
        else torch.nn.Parameter(weight.detach()[chosen].to(dtype), requires_grad=False)
        for name, weight in module._parameters.items()
    }
    return part


@dataclass
class Squares:
    """Sums of squares that relative errors are made of, over any number of parts of a layer."""

    eager: float = 0.0
    triton: float = 0.0
    exact: float = 0.0

    def add(self, eager: Tensor, triton: Tensor, exact: Tensor) -> None:
        """Count one part's outputs; what is not finite is infinitely wrong."""
        self.eager += _square(eager - exact)
        self.triton += _square(triton - exact)
        self.exact += _square(exact)

    def errors(self) -> Errors:
        """`‖Δ‖₂ / ‖exact‖₂`."""
        norm = self.exact or 1.0
        return Errors(eager=(self.eager / norm) ** 0.5, triton=(self.triton / norm) ** 0.5)


def _square(values: Tensor) -> float:
    found = float(values.double().square().sum())
    return found if math.isfinite(found) else math.inf


def run_part(
    module: Any, routed: Routed, chosen: Tensor, dtype: torch.dtype, squares: Squares
) -> None:
    """Run some experts by both implementations in `dtype`, and by the module in fp64.

    Inputs and weights are rounded to `dtype` first, so that only the computation differs. On the
    CPU, where Triton is its interpreter, 16-bit arithmetic is emulated: fp32 tensors that hold
    16-bit values, and what a 16-bit kernel rounds is rounded by hand.

    Args:
        module: a transformers experts module.
        routed: what reaches it.
        chosen: the experts to run.
        dtype: float32, bfloat16, or (on a GPU) float16.
        squares: sums to add to.

    Raises:
        UnsupportedError: no layout describes what the module computes.
    """
    layout = layout_of(module)
    some = only(routed, chosen, module.num_experts)
    if not len(some.x_ND):
        return
    rounded = Routed(some.x_ND.to(dtype), some.experts_NK, some.gates_NK.to(dtype))
    with torch.no_grad():
        exact = _eager(module, rounded, chosen, torch.float64)
        eager = _eager(module, rounded, chosen, dtype)
        triton = _triton(part_of(module, chosen, dtype), layout, rounded, dtype)
    squares.add(eager, triton, exact)


def _eager(module: Any, routed: Routed, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    part = part_of(module, chosen, dtype)
    x_ND, experts_NK, gates_NK = routed
    y_ND: Tensor = part(x_ND.to(dtype), experts_NK, gates_NK.to(dtype))
    return y_ND


def _triton(part: Any, layout: Any, routed: Routed, dtype: torch.dtype) -> Tensor:
    from moe_compose.kernels import triton_forward

    x_ND, experts_NK, gates_NK = routed
    emulated = dtype == torch.bfloat16 and x_ND.device.type == "cpu"
    if emulated:
        part._parameters = {
            name: None if w is None else torch.nn.Parameter(w.float(), requires_grad=False)
            for name, w in part._parameters.items()
        }
        x_ND = x_ND.float()
    return triton_forward.moe_forward(
        x_ND, weights_of(part), layout, experts_NK, gates_NK, emulate_bf16=emulated
    )
