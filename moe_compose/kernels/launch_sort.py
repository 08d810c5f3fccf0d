# mypy: disable-error-code="import-untyped"
"""Launches the sort (`triton_sort.py`): four small kernels, no answer waited for.

Shape suffixes: T tokens, E experts, K top-k, P pairs = T·K, L tiles of pairs, B tiles of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_compose.kernels import triton_sort

#: Pairs per tile of the sort, tiles per step of its scan, experts per program, tiles per program.
_SORT_PAIRS, _SCAN_TILES, _SORT_EXPERTS, _SCHEDULE_TILES = 128, 256, 128, 32

#: Triton 3.10 turns multiply-add fusion off unless it is asked for.
FUSED = {"enable_fp_fusion": True}


class Sorted(NamedTuple):
    """Pairs in the order of their experts, and how programs share them; see `triton_sort`."""

    pair_of_P: Tensor  # noqa: N815
    slot_of_P: Tensor  # noqa: N815
    starts_E: Tensor  # noqa: N815
    totals_E: Tensor  # noqa: N815
    expert_B: Tensor  # noqa: N815
    row_B: Tensor  # noqa: N815
    end_B: Tensor  # noqa: N815


def sort_pairs(experts_TK: Tensor, experts: int, rows: int) -> Sorted:
    """Order the pairs by expert and cut them into tiles of `rows`."""
    ids_P = experts_TK.flatten().contiguous()
    pairs, device = len(ids_P), ids_P.device
    tiles = triton.cdiv(pairs, _SORT_PAIRS)
    blocks = _most_tiles(pairs, experts, rows)
    sizes = [pairs, pairs, experts, experts, blocks, blocks, blocks]
    order = Sorted(*(torch.empty(n, dtype=torch.int32, device=device) for n in sizes))
    counts_LE = torch.empty(tiles, experts, dtype=torch.int32, device=device)
    before_LE = torch.empty_like(counts_LE)
    padded = triton.next_power_of_2(experts)
    chunk = min(padded, _SORT_EXPERTS)
    triton_sort.histogram[tiles, padded // chunk](
        ids_P, counts_LE, pairs, E=experts, BE=chunk, BP=_SORT_PAIRS, **FUSED
    )
    triton_sort.scan[experts,](
        counts_LE, before_LE, order.totals_E, tiles, E=experts, BL=_SCAN_TILES, **FUSED
    )
    _schedule(order, rows)
    triton_sort.scatter[tiles,](
        ids_P,
        before_LE,
        order.starts_E,
        order.pair_of_P,
        order.slot_of_P,
        pairs,
        E=experts,
        BP=_SORT_PAIRS,
        **FUSED,
    )
    return order


def cut_again(order: Sorted, rows: int) -> Sorted:
    """The same order of the same pairs, in tiles of other `rows`: one launch."""
    blocks = _most_tiles(len(order.pair_of_P), len(order.totals_E), rows)
    lists = (order.expert_B.new_empty(blocks) for _ in range(3))
    again = Sorted(*order[:4], *lists)
    _schedule(again, rows)
    return again


def _most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Every expert that has a row may leave one tile unfilled."""
    return (pairs + min(experts, pairs) * (rows - 1)) // rows


def _schedule(order: Sorted, rows: int) -> None:
    blocks, experts = len(order.expert_B), len(order.totals_E)
    triton_sort.schedule[triton.cdiv(blocks, _SCHEDULE_TILES),](
        order.totals_E,
        order.starts_E,
        order.expert_B,
        order.row_B,
        order.end_B,
        blocks,
        ROWS=rows,
        E=experts,
        E_PADDED=triton.next_power_of_2(experts),
        BB=_SCHEDULE_TILES,
        **FUSED,
    )
