# mypy: disable-error-code="import-untyped"
"""Launches what adds the column tiles' parts of ‖f‖² to the saliency sums (`triton_saliency.py`).

Shape suffixes: P pairs = T·K, E experts, N column tiles of `down`, S shares of an expert's rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_compose.kernels import triton_saliency
from moe_compose.kernels.launch_sort import FUSED, Sorted
from moe_compose.kernels.saliency import Saliency

#: Rows of a program's step, programs for one expert at most, experts of a program of the last step.
_ROWS, _SHARES, _EXPERTS = 256, 16, 64


def add_saliency(squares_NP: Tensor, gates_P: Tensor, order: Sorted, saliency: Saliency) -> None:
    """Add the rows that `order` has to their experts' sums."""
    columns, pairs = squares_NP.shape
    experts = len(order.totals_E)
    shares = min(_SHARES, triton.next_power_of_2(triton.cdiv(pairs, _ROWS)))
    parts_5SE = squares_NP.new_empty(5, shares, experts, dtype=torch.float64)
    triton_saliency.partial_sums[experts * shares,](
        squares_NP,
        gates_P,
        order.pair_of_P,
        order.starts_E,
        order.totals_E,
        parts_5SE,
        pairs,
        E=experts,
        COLUMNS=columns,
        SHARES=shares,
        BP=_ROWS,
        **FUSED,
    )
    triton_saliency.add_sums[6, triton.cdiv(experts, _EXPERTS)](
        parts_5SE,
        order.totals_E,
        saliency.table_6E,
        E=experts,
        SHARES=shares,
        BE=_EXPERTS,
        **FUSED,
    )
