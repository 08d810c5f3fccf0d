"""A layer's experts run once, for the model and for what is measured of them.

transformers' eager loop over the experts, written again: the same operations on the same rows in
the same order, so what the experts return together is the same in every bit. Between an expert and
the sum, its output f is there to be measured.

What a class does between its matrices is its own `_apply_gate` or `act_fn`, and how they lie is
what its flags say; that both are the whole of it is found by trying: the first few tokens of a
layer also go through the class's own forward. Where the two differ in a bit, or a class has no such
flags, the class's own runs, and experts run a second time to be measured (`pairs.py`).

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, N an expert's rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_compose.calibration.pairs import Pairs, sizes
from moe_compose.kernels.hook import weights_of

log = logging.getLogger(__name__)

#: Tokens that both forwards are compared on.
_PROBE = 4


class Once:
    """In place of an experts module's forward, while it is watched.

    Args:
        module: takes hidden states `[T, D]`, expert indices and weights `[T, K]`.
        experts: how many are measured; what lies beyond has no FFN.
    """

    def __init__(self, module: Any, experts: int) -> None:
        self._module, self._experts = module, experts
        self._sum_in: torch.dtype | None = None
        self._pairs: Pairs | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the module's experts here in this context."""
        if not hasattr(self._module, "is_transposed"):
            _say(type(self._module).__name__, "is outside of transformers' experts interface")
            yield
            return
        own = self._module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())[:3]
            if self._sum_in is None and not self._agrees(own, given):
                self._module.__dict__.pop("forward")
                return own(*args, **kwargs)
            return self._run(*given)

        self._module.__dict__["forward"] = forward
        try:
            yield
        finally:
            self._module.__dict__.pop("forward", None)

    def take(self) -> Pairs | None:
        """What was measured in the call that just ended; None where the class's own ran."""
        found, self._pairs = self._pairs, None
        return found

    def _agrees(self, own: Any, given: tuple[Tensor, ...]) -> bool:
        """Whether a few tokens come out the same; settles the dtype that the class sums in."""
        few = tuple(t[:_PROBE] for t in given)
        if all(t.dim() == 2 for t in given):
            expected = own(*few)
            for self._sum_in in (given[0].dtype, given[2].dtype):
                if torch.equal(self._run(*few), expected):
                    return True
        self._sum_in = self._pairs = None
        _say(type(self._module).__name__, "computes its experts in a way of its own")
        return False

    def _run(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """The experts' sum; ‖f‖ and max|f| of every pair are kept."""
        y_TD = torch.zeros(x_TD.shape, dtype=self._sum_in, device=x_TD.device)
        tokens, choices = ids_TK.shape
        norm_KT = torch.zeros(choices, tokens, dtype=torch.float64, device=x_TD.device)
        peak_KT = torch.zeros_like(norm_KT)
        for e, rows_N in _rows(ids_TK.T, self._experts):
            token_N = rows_N % tokens
            f_ND = expert_output(self._module, e, x_TD[token_N])
            norm_KT.view(-1)[rows_N], peak_KT.view(-1)[rows_N] = sizes(f_ND)
            f_ND = f_ND * gates_TK[token_N, rows_N // tokens, None]
            y_TD.index_add_(0, token_N, f_ND.to(self._sum_in))
        self._pairs = Pairs(norm_KT.T, peak_KT.T)
        return y_TD.to(x_TD.dtype)


def expert_output(module: Any, expert: int, x_ND: Tensor) -> Tensor:
    """One expert on its tokens, before the router's weight, `[N, D]`: bit for bit what transformers
    computes, which `kernels.reference` only is within rounding (it adds biases inside of products).

    Args:
        module: of transformers' experts interface.
        expert: which.
        x_ND: its tokens.
    """
    weights = weights_of(module)
    z = _product(module, x_ND, weights.gate_up[expert], weights.gate_up_bias, expert)
    h_NF = module._apply_gate(z) if module.has_gate else module.act_fn(z)
    return _product(module, h_NF, weights.down[expert], weights.down_bias, expert)


def _product(module: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    if not module.is_transposed:
        return functional.linear(x, matrix, None if bias is None else bias[expert])
    return x @ matrix if bias is None else x @ matrix + bias[expert]


def _rows(ids_KT: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each chosen expert with its places among the flattened choices, in their order. Asks the
    device once.
    """
    flat = ids_KT.flatten()
    valid = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(valid, stable=True)
    counts = torch.bincount(valid, minlength=experts + 1).tolist()
    for e, rows_N in enumerate(torch.split(order, counts)[:experts]):
        if len(rows_N):
            yield e, rows_N


@cache
def _say(module: str, reason: str) -> None:
    log.info("%s %s: its experts run a second time to be measured", module, reason)
