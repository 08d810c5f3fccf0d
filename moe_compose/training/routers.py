"""What the routers of a model do in a forward pass: logits, with their gradients, and dispatch.

Logits are those of `calibration.router`; dispatch is what the layer's experts are really called
with, or the top k of the logits where the class calls them with something else.

Shape suffixes: T tokens, padding included, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_compose.architectures import MoE
from moe_compose.calibration.calls import experts_in
from moe_compose.calibration.router import RouterView
from moe_compose.errors import UnsupportedError
from moe_compose.runtime import Layer


class Seen(NamedTuple):
    """A router's part of a forward pass.

    Attributes:
        logits_TE: for all experts, after a softcap; fp32, with gradients.
        counts_E: how many of the tokens that count each expert got.
    """

    logits_TE: Tensor  # noqa: N815
    counts_E: Tensor  # noqa: N815


class Routers:
    """All routers of a model.

    Args:
        layers: its decoder layers.
        moe: what its config says.

    Attributes:
        layers: the sparse ones whose router chooses, in the order in which they are seen.

    Raises:
        UnsupportedError: experts that cannot be watched.
    """

    def __init__(self, layers: Sequence[Layer], moe: MoE) -> None:
        hashed = moe.routing.hashed_layers  # the first ones, where a table chooses
        self.layers = tuple(i for i in moe.sparse_layers if i >= hashed)
        self._moe = moe
        self._watched = [_Watched(layers[i], moe) for i in self.layers]

    @contextmanager
    def watching(self, real_T: Tensor) -> Iterator[dict[int, Seen]]:
        """Layer → what its router did in the forward pass that runs in this context.

        Args:
            real_T: tokens that count.

        Raises:
            UnsupportedError: a router whose logits are not seen.
        """
        found: dict[int, Seen] = {}
        with ExitStack() as stack:
            for one in self._watched:
                stack.enter_context(one.watching())
            yield found
        for one in self._watched:
            found[one.layer.index] = one.take(real_T)

    def checkpoint(self, layers: Sequence[Layer]) -> None:
        """Let decoder layers recompute their activations in the backward pass, watched as in the
        forward pass: what is seen is part of the graph.
        """
        watched = {one.layer.index: one for one in self._watched}
        for layer in layers:
            one = watched.get(layer.index)
            again = one.again if one is not None else nullcontext
            layer.module.forward = partial(
                checkpoint,
                layer.module.forward,
                use_reentrant=False,
                context_fn=partial(_contexts, again),
            )


def _contexts(
    again: Callable[[], AbstractContextManager[None]],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), again()


class _Watched:
    """One router."""

    def __init__(self, layer: Layer, moe: MoE) -> None:
        experts = experts_in(layer, moe)
        if experts is None:
            name = type(layer.module).__name__
            raise UnsupportedError(f"the experts of {name} (layer {layer.index}) cannot be watched")
        self.layer, self._moe, self._experts = layer, moe, experts
        self._view = RouterView(layer, experts, moe.num_experts + moe.zero_experts, moe.routing)
        self._ids_TK: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self._view.watching():
            handle = self._experts.register_forward_pre_hook(self._see, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around a second forward pass, whose results are those of the first."""
        with self._view.watching():
            try:
                yield
            finally:
                self._view.take(0)

    def take(self, real_T: Tensor) -> Seen:
        logits_TE = self._view.take(len(real_T))
        ids_TK, self._ids_TK = self._ids_TK, None
        if logits_TE is None:
            name = type(self.layer.router).__name__
            raise UnsupportedError(
                f"layer {self.layer.index}: the logits of {name} cannot be seen, so it cannot be "
                "trained here"
            )
        if ids_TK is None or ids_TK.shape[0] != len(real_T):
            ids_TK = logits_TE.detach().topk(self._moe.top_k, dim=-1).indices
        experts = self._moe.num_experts
        ids_N = ids_TK[real_T].flatten()
        counts_E = torch.bincount(ids_N[(ids_N >= 0) & (ids_N < experts)], minlength=experts)
        return Seen(logits_TE, counts_E.to(torch.float32))

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = (*args, *kwargs.values())
        if self.layer.experts is not None and len(given) > 1 and not given[1].is_floating_point():
            self._ids_TK = given[1].flatten(0, -2)
