"""A numeric check of the kernels, once per device, where compiling them proves too little.

On sm_100, triton 3.6.0 to 3.8.0 compile some products into wrong ones: two that feed one
accumulator within a loop (github.com/triton-lang/triton/issues/10821). None of the kernels has such
a loop; but nobody has run them there, and a wrong product looks like any other. So the first
`choose` on such a device runs small layers, forward and backward, against the reference in fp64.
That compiles some twenty kernels, and it waits for the device: it cannot happen while a CUDA graph
is captured. The verdict is kept for the process, and logged.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_compose.kernels import reference
from moe_compose.kernels.configs import arch_of
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights

log = logging.getLogger(__name__)

#: Where kernels are not believed unseen.
CHECKED = ("sm_100",)

#: How far from fp64 they may be: as a multiple of the eager reference's error, or in all.
FACTOR, LEAST = 2.0, 2e-6

_EXPERTS, _TOP_K = 4, 2
_CLAMPED = ExpertLayout(interleaved=True, transposed=True, activation="clamped_swiglu", limit=7.0)
#: Layout, D, F, rows per expert: every kind of entry in the table; sizes that tiles divide, or not.
PROBES = (
    (ExpertLayout(), 512, 256, 256),
    (_CLAMPED, 528, 272, 256),
    (ExpertLayout(), 512, 256, 64),
    (ExpertLayout(), 512, 256, 8),
)
_VERDICTS: dict[tuple[torch.device, torch.dtype], str] = {}

Probes = tuple[tuple[ExpertLayout, int, int, int], ...]
Forward = Callable[[Tensor, ExpertWeights, ExpertLayout, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """The arguments of `moe_forward`."""

    x_TD: Tensor  # noqa: N815
    weights: ExpertWeights
    layout: ExpertLayout
    experts_TK: Tensor  # noqa: N815
    weights_TK: Tensor  # noqa: N815


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels are not to be used on `device`; empty if they may.

    The first call for a device of `CHECKED` runs them there.
    """
    arch = arch_of(device)
    if arch not in CHECKED:
        return ""
    key = (device, dtype)
    if key not in _VERDICTS:
        if torch.cuda.is_current_stream_capturing():
            return f"kernels for {arch} are checked at first use: run once before capturing a graph"
        _VERDICTS[key] = ""  # `moe_forward` asks again
        _VERDICTS[key] = found = probe(device, dtype, _triton)
        log.info("kernels checked on %s, %s: %s", device, dtype, found or "as exact as eager")
    return _VERDICTS[key]


def probe(
    device: torch.device, dtype: torch.dtype, forward: Forward, probes: Probes = PROBES
) -> str:
    """What is wrong with `forward` and its gradients on small layers; empty if nothing."""
    for layout, model, width, rows in probes:
        layer = random_layer(layout, model, width, _EXPERTS, _TOP_K, rows * _EXPERTS // _TOP_K)
        layer = to(layer, device, dtype)
        exact = _results(reference.moe_forward, to(layer, device, torch.float64))
        eager = _results(reference.moe_forward, layer)
        try:
            ours = _results(forward, layer)
        except Exception as error:  # whatever a compiler may raise
            return f"its check failed: {type(error).__name__}: {error}"
        for name, truth in exact.items():
            wrong, allowed = distance(ours[name], truth), FACTOR * distance(eager[name], truth)
            if not wrong <= max(allowed, LEAST):
                return f"its check failed: {name} of a layer is off by {wrong:.1e}"
    return ""


def random_layer(
    layout: ExpertLayout, model: int, width: int, experts: int, top_k: int, tokens: int
) -> Layer:
    """A layer of sizes D, F, E, K, and T tokens for it, on the CPU in fp32; always the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    fused = width * (2 if layout.gated else 1)
    first = draw(experts, fused, model, scale=model**-0.5)
    second = draw(experts, model, width, scale=width**-0.5)
    biased = layout.activation == "clamped_swiglu"
    weights = ExpertWeights(
        gate_up=first.mT.contiguous() if layout.transposed else first,
        down=second.mT.contiguous() if layout.transposed else second,
        gate_up_bias=draw(experts, fused) if biased else None,
        down_bias=draw(experts, model) if biased else None,
    )
    gates_TK, ids_TK = draw(tokens, experts).softmax(-1).topk(top_k)
    return Layer(draw(tokens, model), weights, layout, ids_TK, gates_TK)


def to(layer: Layer, device: torch.device, dtype: torch.dtype) -> Layer:
    """The same layer elsewhere, in another precision; the router's weights stay in fp32."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, dtype)

    w = layer.weights
    return layer._replace(
        x_TD=layer.x_TD.to(device, dtype),
        weights=ExpertWeights(
            gate_up=w.gate_up.to(device, dtype),
            down=w.down.to(device, dtype),
            gate_up_bias=moved(w.gate_up_bias),
            down_bias=moved(w.down_bias),
        ),
        experts_TK=layer.experts_TK.to(device),
        weights_TK=layer.weights_TK.to(device),
    )


def distance(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖."""
    ours, exact = ours.double(), exact.double()
    return float((ours - exact).norm() / exact.norm())


def _results(forward: Forward, layer: Layer) -> dict[str, Tensor]:
    """The output, and the gradients of its sum with fixed weights."""
    x_TD, gates_TK = (t.detach().requires_grad_() for t in (layer.x_TD, layer.weights_TK))
    with torch.enable_grad():
        y_TD = forward(x_TD, layer.weights, layer.layout, layer.experts_TK, gates_TK)
        weight_TD = torch.linspace(-1, 1, y_TD.numel(), device=y_TD.device, dtype=torch.float64)
        weight_TD = weight_TD.view_as(y_TD).to(y_TD.dtype)
        of_x, of_gates = torch.autograd.grad(y_TD, (x_TD, gates_TK), weight_TD)
    return {
        "the output": y_TD.detach(),
        "the gradient of x": of_x,
        "the gradient of the router's weights": of_gates,
    }


def _triton(
    x_TD: Tensor, weights: ExpertWeights, layout: ExpertLayout, ids_TK: Tensor, gates_TK: Tensor
) -> Tensor:
    from moe_compose.kernels.choice import moe_forward

    return moe_forward(x_TD, weights, layout, ids_TK, gates_TK, implementation="triton")
