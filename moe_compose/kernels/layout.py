"""How the expert matrices of one layer lie in memory, and what is computed between them.

One expert, for a row x, with z = W_1 x + b_1:

    gated       h = act(z_gate) · z_up        y = W_2 h + b_2
    not gated   h = act(z)                    y = W_2 h + b_2

All families of transformers with stacked experts differ in the five facts of `ExpertLayout` only.

Shape suffixes: E experts, D model, F expert width, P = 2F if gated, F otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from moe_compose.errors import OptionError
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.saliency import Saliency

#: `relu2` is relu squared (Nemotron-H); `clamped_swiglu` is gpt-oss's (2508.10925):
#: z_gate · sigmoid(alpha · z_gate) · (z_up + 1).
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """The facts that tell one family's stacked experts from another's.

    Attributes:
        gated: whether half of the first matrix gates the other half.
        interleaved: gate and up rows alternate (gpt-oss) instead of all gates preceding all ups.
        transposed: both matrices are stored `[in, out]` instead of `[out, in]`.
        activation: see `Activation`.
        alpha: factor inside the sigmoid of `clamped_swiglu`.
        limit: z_gate is cut at +limit and z_up at ±limit before the activation; None: not.

    Raises:
        OptionError: a combination that no formula above describes.
    """

    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    activation: Activation = "silu"
    alpha: float = 1.702
    limit: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            problems.append(f"activation ({self.activation!r}) is none of {known}: pick one")
        if not self.gated:
            if self.interleaved:
                problems.append("interleaved means gate and up rows alternate: set gated = True")
            if self.activation == "clamped_swiglu":
                problems.append("clamped_swiglu needs gate and up: set gated = True")
            if self.limit is not None:
                problems.append(f"limit ({self.limit:g}) is for gated experts: leave it out")
        if self.limit is not None and not self.limit > 0:
            problems.append(f"limit ({self.limit:g}) must be positive")
        if problems:
            raise OptionError("not a layout of experts", problems=problems)


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The tensors of one layer's experts; dtype and device are the same for all.

    Attributes:
        gate_up: W_1, `[E, P, D]`, or `[E, D, P]` if transposed.
        down: W_2, `[E, D, F]`, or `[E, F, D]` if transposed.
        gate_up_bias: b_1, `[E, P]`, its order as in `gate_up`; or None.
        down_bias: b_2, `[E, D]`, or None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that exist."""
        given = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return tuple(t for t in given if t is not None)

    def sizes(self, layout: ExpertLayout) -> tuple[int, int]:
        """`(D, F)`."""
        model, width = self.down.shape[1:][:: -1 if layout.transposed else 1]
        return model, width


def check(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    saliency: Saliency | None = None,
    lora: ExpertLora | None = None,
) -> None:
    """Whether all shapes fit one another.

    Raises:
        OptionError: all that do not, at once.
    """
    problems = list(_problems(x_TD, weights, layout, experts_TK, weights_TK, lora))
    if saliency is not None:
        table = saliency.table_6E
        if table.shape != (6, weights.experts) or table.device != x_TD.device:
            fits = f"Saliency.zeros({weights.experts}, {str(x_TD.device)!r})"
            problems.append(f"saliency ({list(table.shape)}, {table.device}) must be {fits}")
    if problems:
        raise OptionError("these tensors are not one layer of experts", problems=problems)


def _problems(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    ids: Tensor,
    gates: Tensor,
    lora: ExpertLora | None,
) -> Iterator[str]:
    if weights.down.dim() != 3:
        yield f"down must have 3 dimensions (got {list(weights.down.shape)})"
        return
    experts = weights.experts
    model, width = weights.sizes(layout)
    fused = width * (2 if layout.gated else 1)
    first = [experts, model, fused] if layout.transposed else [experts, fused, model]
    named: list[tuple[str, Tensor | None, list[int]]] = [
        ("gate_up", weights.gate_up, first),
        ("gate_up_bias", weights.gate_up_bias, [experts, fused]),
        ("down_bias", weights.down_bias, [experts, model]),
    ]
    for name, tensor, wanted in named:
        if tensor is not None and list(tensor.shape) != wanted:
            yield f"{name} must be {wanted} beside this down (got {list(tensor.shape)})"
    if x_TD.dim() != 2 or x_TD.shape[1] != model:
        yield f"x must be [tokens, {model}] (got {list(x_TD.shape)}): flatten batch and sequence"
    if ids.dim() != 2 or ids.shape != gates.shape or ids.shape[0] != x_TD.shape[0]:
        got = f"{list(ids.shape)} and {list(gates.shape)}"
        yield f"experts and weights must both be [{x_TD.shape[0]}, k] (got {got})"
    if ids.is_floating_point() or ids.is_complex():
        yield f"experts must be integers (got {ids.dtype})"
    if not x_TD.is_floating_point():
        yield f"x must be of floats (got {x_TD.dtype})"
    if len({t.dtype for t in weights.tensors}) > 1:
        yield "all expert tensors must have one dtype"
    added = () if lora is None else lora.tensors
    if lora is not None:
        yield from lora.problems(experts, model, fused, width)
    if len({t.device for t in (x_TD, ids, gates, *weights.tensors, *added)}) > 1:
        yield "all tensors must be on one device"
