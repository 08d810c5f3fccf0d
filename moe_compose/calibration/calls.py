"""What a layer's experts are called with, whatever the class calls them with.

Nearly all classes hand their experts hidden states, the chosen experts and the dispatched weights.
Where the weight multiplies an expert's *input* (Llama 4), the experts are given E copies of all
tokens, scaled by scores that are 0 where an expert was not chosen; there the class itself makes an
(experts × tokens × hidden) tensor, and batches should be small.

Shape suffixes: T tokens of a batch, padding included, D model, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.architectures import MoE
from moe_compose.calibration.once import Once
from moe_compose.calibration.pairs import Pairs, experts_of, measure
from moe_compose.runtime import Layer

#: Which tokens of a batch: a bool `[T]`, or all of them.
Kept = Tensor | slice


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer's experts.

    Attributes:
        x_TD: the tokens.
        ids_TK: the experts chosen.
        gates_TK: the dispatched weights.
        y_TD: what the routed experts return together.
        pairs: ‖f‖ and max|f| of every pair, of the tokens that are wanted.
        applied: the weight multiplies the expert's output; otherwise f is the expert's output on
            its weighted input, and nothing multiplies it.
    """

    x_TD: Tensor  # noqa: N815
    ids_TK: Tensor  # noqa: N815
    gates_TK: Tensor  # noqa: N815
    y_TD: Tensor  # noqa: N815
    pairs: Callable[[Kept], Pairs]
    applied: bool = True


#: Told of every call.
See = Callable[[Call], None]


def experts_in(layer: Layer, moe: MoE) -> nn.Module | None:
    """The module that computes a layer's routed experts; None where there is none that can be
    watched.
    """
    if layer.experts is not None or moe.routing.applied_to != "input" or layer.router is None:
        return layer.experts
    for module in layer.module.modules():
        own = list(module.parameters(recurse=False))
        if len(own) > 1 and all(p.dim() == 3 and len(p) == moe.num_experts for p in own):
            return module
    return None


@contextmanager
def watching(layer: Layer, experts: nn.Module, moe: MoE, see: See) -> Iterator[None]:
    """Tell `see` of every call of a layer's experts.

    Args:
        layer: the decoder layer.
        experts: what `experts_in` found in it.
        moe: what the config says of the experts.
        see: told of every call.
    """
    with ExitStack() as stack:
        if layer.experts is not None:
            direct = _Direct(experts, moe, see)
            stack.enter_context(direct.once.in_place())
            handles = [experts.register_forward_hook(direct.run, with_kwargs=True)]
        else:
            assert layer.router is not None
            scaled = _Scaled(moe, see)
            handles = [
                layer.router.register_forward_hook(scaled.route),
                experts.register_forward_hook(scaled.run),
            ]
        for handle in handles:
            stack.callback(handle.remove)
        yield


class _Direct:
    """Experts that are given tokens, choices and weights."""

    def __init__(self, experts: nn.Module, moe: MoE, see: See) -> None:
        self._one, self._experts, self._see = experts_of(experts), moe.num_experts, see
        self.once = Once(experts, moe.num_experts)

    def run(self, module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        """The experts ran: what was measured meanwhile, or will be when it is asked for."""
        x, ids_TK, gates = (*args, *kwargs.values())[:3]
        x_TD, found = x.reshape(-1, x.shape[-1]), self.once.take()

        def pairs(kept: Kept) -> Pairs:
            if found is None:
                return measure(self._one, self._experts, x_TD[kept], ids_TK[kept])
            return Pairs(found.norm_TK[kept], found.peak_TK[kept])

        y_TD = output.reshape(x_TD.shape)
        self._see(Call(x_TD, ids_TK, gates.reshape(ids_TK.shape), y_TD, pairs))


class _Scaled:
    """Experts whose input is weighted: what the router returned is remembered until they ran."""

    def __init__(self, moe: MoE, see: See) -> None:
        self._moe, self._see = moe, see
        self._routed: tuple[Tensor, Tensor] | None = None

    def route(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Hidden states, and the scores: of what the router returns, the table that is 0 for
        experts that were not chosen.
        """
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        shape = (len(x_TD), self._moe.num_experts)
        for table in output if isinstance(output, tuple) else (output,):
            chosen = isinstance(table, Tensor) and table.shape == shape
            if chosen and bool(((table != 0).sum(-1) <= self._moe.top_k).all()):
                self._routed = x_TD, table

    def run(self, module: Any, args: Any, output: Tensor) -> None:
        """The experts ran on all tokens; their outputs for the chosen ones are among them."""
        if self._routed is None:
            return
        (x_TD, scores_TE), self._routed = self._routed, None
        gates_TK, ids_TK = scores_TE.topk(self._moe.top_k, dim=-1)
        f_ETD = output.reshape(self._moe.num_experts, *x_TD.shape)

        def pairs(kept: Kept) -> Pairs:
            tokens = torch.arange(len(x_TD), device=x_TD.device)[:, None]
            f_TKD = f_ETD[ids_TK, tokens][kept]
            norms = torch.linalg.vector_norm(f_TKD, dim=-1, dtype=torch.float64)
            return Pairs(norms, f_TKD.abs().amax(-1).double())

        self._see(Call(x_TD, ids_TK, gates_TK, f_ETD.sum(0), pairs, applied=False))
