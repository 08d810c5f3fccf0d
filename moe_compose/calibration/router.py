"""The router's logits for all experts, read where the layer computes them.

transformers' routers return all kinds of things, some of them under the name of logits what are
probabilities. So what a module returns is not asked for: a linear layer inside of the router that
has a row for every expert returns logits, and otherwise the router's own matrix is multiplied.

Shape suffixes: T tokens, D model, E experts (and rows of no FFN, where a family has them).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.architectures.routing_form import Routing
from moe_compose.routing import router_logits
from moe_compose.runtime import Layer


class RouterView:
    """The logits of the batch that runs now.

    Args:
        layer: the decoder layer.
        experts: the module that computes its experts.
        rows: of the router's matrix: experts, and those of no FFN.
        routing: the scheme.
    """

    def __init__(self, layer: Layer, experts: nn.Module, rows: int, routing: Routing) -> None:
        self._layer, self._experts = layer, experts
        self._rows, self._routing = rows, routing
        parts = [] if layer.router is None else list(layer.router.modules())
        inner = [m for m in parts if isinstance(m, nn.Linear) and m.out_features == rows]
        self._matrix = inner[-1] if inner else layer.router
        self._logits: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the router's calls."""
        handles = [m.register_forward_hook(self._see) for m in self._watched()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, tokens: int) -> Tensor | None:
        """The batch's logits `[T, E]`, fp32, after a softcap; None where they are unknown."""
        found, self._logits = self._logits, None
        if found is None or found.numel() != tokens * self._rows:
            return None
        logits_TE = found.reshape(tokens, self._rows).float()
        cap = self._routing.softcap
        return torch.tanh(logits_TE / cap) * cap if cap else logits_TE

    def _watched(self) -> Iterator[nn.Module]:
        """The module with the matrix, and the one around it, which may use the matrix without a
        call; not if it holds the experts too, since then it returns too late.
        """
        if self._matrix is None:
            return
        yield self._matrix
        for module in self._layer.module.modules():
            holds = any(m is self._experts for m in module.modules())
            if not holds and any(m is self._matrix for m in module.children()):
                yield module

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._logits is not None:
            return
        if type(module) is nn.Linear:
            self._logits = output
            return
        weight, given = getattr(self._matrix, "weight", None), args[0] if args else None
        if not (isinstance(weight, Tensor) and isinstance(given, Tensor)):
            return
        if weight.dim() != 2 or weight.shape != (self._rows, given.shape[-1]):
            return
        bias = getattr(self._matrix, "bias", None) if self._routing.logit_bias else None
        self._logits = router_logits(given.flatten(0, -2), weight, bias)


def probabilities(logits_TE: Tensor, routing: Routing) -> Tensor:
    """The router's distribution over all experts, `[T, E]`, fp64: softmax, or the scores that the
    scheme compares divided by their sum.
    """
    wide = logits_TE.double()
    if routing.score in ("sigmoid", "topk_sigmoid"):
        scores = wide.sigmoid()
    elif routing.score == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(wide).sqrt()
    else:
        return wide.softmax(-1)
    return scores / scores.sum(-1, keepdim=True)
