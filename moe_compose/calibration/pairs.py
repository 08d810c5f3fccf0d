"""What each expert makes of the tokens that were sent to it: two numbers a pair, not a vector.

The (token, expert) pairs are sorted by expert, and one expert runs on some of its rows at a time;
of its output f only ‖f‖ and max|f| are kept. So memory grows with the pairs, never with experts ×
tokens × hidden.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, N an expert's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moe_compose.errors import UnsupportedError
from moe_compose.kernels.hook import layout_of, weights_of
from moe_compose.kernels.layout import ExpertLayout
from moe_compose.kernels.reference import activate, expert_forward

#: Rows that one expert runs on at a time.
ROWS = 2048

#: Elements of an expert's output whose squares are summed in fp32.
BLOCK = 32

#: One expert on rows `[N, D]`, before the router's weight: `[N, D]`.
Expert = Callable[[int, Tensor], Tensor]


class Pairs(NamedTuple):
    """What was measured of every (token, expert) pair, fp64; 0 where there is none.

    Attributes:
        norm_TK: ‖f‖.
        peak_TK: max |f|.
    """

    norm_TK: Tensor  # noqa: N815
    peak_TK: Tensor  # noqa: N815


def experts_of(module: Any) -> Expert:
    """The experts of a transformers module, one at a time: by the layout of its matrices, or, where
    no layout describes it, by the module itself with one expert chosen at weight 1.

    Args:
        module: takes hidden states `[T, D]`, expert indices and weights `[T, K]`.
    """
    layout = _layout(module)
    if layout is None:
        return lambda e, x_ND: _alone(module, e, x_ND)
    weights = weights_of(module)
    return lambda e, x_ND: expert_forward(x_ND, weights, layout, e)


def hidden_of(module: Any) -> Expert | None:
    """What the second matrix of each expert is given, `[N, F]`; None where no layout describes the
    module.
    """
    layout = _layout(module)
    if layout is None:
        return None
    weights = weights_of(module)

    def hidden(e: int, x_ND: Tensor) -> Tensor:
        matrix = weights.gate_up[e].to(x_ND.dtype)
        bias = None if weights.gate_up_bias is None else weights.gate_up_bias[e].to(x_ND.dtype)
        z = functional.linear(x_ND, matrix.T if layout.transposed else matrix, bias)
        return activate(z, layout)

    return hidden


def measure(run: Expert, experts: int, x_TD: Tensor, ids_TK: Tensor) -> Pairs:
    """‖f‖ and max|f| of every pair.

    Args:
        run: one expert on some rows.
        experts: how many there are.
        x_TD: the tokens.
        ids_TK: the experts chosen for each; ids outside `0..experts-1` are passed over.
    """
    norms = torch.zeros(ids_TK.numel(), dtype=torch.float64, device=x_TD.device)
    peaks = torch.zeros_like(norms)
    for e, rows_N in rows_by_expert(ids_TK, experts):
        norms[rows_N], peaks[rows_N] = sizes(run(e, x_TD[rows_N // ids_TK.shape[1]]))
    return Pairs(norms.view(ids_TK.shape), peaks.view(ids_TK.shape))


def sizes(f_ND: Tensor) -> tuple[Tensor, Tensor]:
    """‖f‖ and max|f| of each row, fp64 `[N]`.

    Squares are summed in fp32 within `BLOCK` elements and in fp64 beyond, which is exact to 1e-7;
    rows of less than four blocks, those that do not divide into blocks, and fp64, all in fp64.
    """
    peak_N = torch.maximum(f_ND.amax(-1), -f_ND.amin(-1)).double()
    width = f_ND.shape[-1]
    if f_ND.dtype == torch.float64 or width % BLOCK or width < 4 * BLOCK:
        return torch.linalg.vector_norm(f_ND, dim=-1, dtype=torch.float64), peak_N
    blocks = f_ND.float().reshape(-1, width // BLOCK, BLOCK)
    part = torch.linalg.vector_norm(blocks, dim=-1).double()
    return torch.linalg.vector_norm(part, dim=-1), peak_N


def rows_by_expert(ids_TK: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert with some of its rows among the flattened pairs, `ROWS` at most. Asks the device
    once.
    """
    flat = ids_TK.flatten()
    valid = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(valid, stable=True)
    counts = torch.bincount(valid, minlength=experts + 1).tolist()
    start = 0
    for e, count in enumerate(counts[:experts]):
        for first in range(start, start + count, ROWS):
            yield e, order[first : min(first + ROWS, start + count)]
        start += count


def _layout(module: Any) -> ExpertLayout | None:
    if not hasattr(module, "is_transposed"):
        return None
    try:
        return layout_of(module)
    except UnsupportedError:
        return None


def _alone(module: Any, expert: int, x_ND: Tensor) -> Tensor:
    """One expert by the module's own forward, its hooks passed over: chosen twice, at weights 1
    and 0, since some modules do not run with a single choice.
    """
    ids_N2 = torch.full((len(x_ND), 2), expert, dtype=torch.int64, device=x_ND.device)
    weights_N2 = torch.tensor([[1.0, 0.0]]).to(x_ND).expand(len(x_ND), 2)
    found: Tensor = module.forward(x_ND, ids_N2, weights_N2)
    return found.reshape(x_ND.shape)
