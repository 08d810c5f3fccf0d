"""The file of `RouterStats`: which tensors it holds, how they are packed, how it is written.

Shape suffixes: D what the router is given, N = D·(D + 1)/2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compose.checkpoint.copying import (
    Run,
    commit_part,
    copy_run,
    create_part,
    discard_part,
    os_errors,
    write_at,
)
from moe_compose.checkpoint.header import encode_header
from moe_compose.checkpoint.source import Extent, TensorInfo


def second_name(layer: int, expert: str) -> str:
    """Tensor of Σ x xᵀ."""
    return f"layers.{layer}.{expert}.second"


def sum_name(layer: int, expert: str) -> str:
    """Tensor of Σ x."""
    return f"layers.{layer}.{expert}.sum"


def layout_of(widths: Mapping[int, int], experts: Sequence[str]) -> list[TensorInfo]:
    """Every tensor, layer after layer, expert after expert.

    Args:
        widths: sparse layer → D.
        experts: those that have text.
    """
    found = []
    for layer, width in widths.items():
        for name in experts:
            size = width * (width + 1) // 2
            found.append(TensorInfo.of(second_name(layer, name), "F32", (size,)))
            found.append(TensorInfo.of(sum_name(layer, name), "F32", (width,)))
    return found


def packed(matrix_DD: Tensor) -> Tensor:
    """The upper triangle `[N]` of a symmetric matrix, row by row."""
    return matrix_DD[_upper(len(matrix_DD)).to(matrix_DD.device)]


def unpacked(values_N: Tensor, width: int) -> Tensor:
    """The symmetric matrix `[D, D]` again."""
    upper_DD = torch.zeros(width, width, dtype=values_N.dtype)
    upper_DD[_upper(width)] = values_N
    return upper_DD + upper_DD.triu(1).T


def _upper(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).triu()


class StatsFile:
    """The file while it is written: whoever looks sees all of it or nothing. A context.

    Args:
        path: where.
        infos: what it will hold.
        metadata: free text.

    Attributes:
        offsets: tensor → where it begins.
    """

    def __init__(
        self, path: Path, infos: Sequence[TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self._path, self._header = path, encode_header(infos, metadata)
        self._descriptor = -1
        self.offsets: dict[str, int] = {}
        at = len(self._header)
        for info in infos:
            self.offsets[info.name] = at
            at += info.nbytes

    def __enter__(self) -> StatsFile:
        with os_errors(f"write {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = create_part(self._path)
            write_at(self._descriptor, memoryview(self._header), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            with os_errors(f"write {self._path}"):
                commit_part(self._path, self._descriptor)
        else:
            os.close(self._descriptor)
            discard_part(self._path)

    def put(self, name: str, values: Tensor) -> None:
        """Write a tensor, rounded to fp32."""
        data = values.float().cpu().contiguous().view(torch.uint8).numpy().data
        with os_errors(f"write {self._path}"):
            write_at(self._descriptor, data, self.offsets[name])

    def copy(self, name: str, block: Extent) -> None:
        """Write bytes that lie elsewhere."""
        run = Run(block.path, block.offset, self.offsets[name], block.nbytes)
        with os_errors(f"write {self._path}"):
            copy_run(run, self._descriptor, lambda count: None)
