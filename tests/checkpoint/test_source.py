"""What can be said of any source of tensors.

pytest tests/checkpoint/test_source.py
"""

from __future__ import annotations

import pytest
from toy_source import ToySource

from moe_compose.checkpoint.source import TensorInfo, common_dtype
from moe_compose.errors import CheckpointError


def source_of(*dtypes: tuple[str, int]) -> ToySource:
    infos = (TensorInfo.of(f"t{i}", dtype, (count,)) for i, (dtype, count) in enumerate(dtypes))
    return ToySource(tensors={info.name: info for info in infos})


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ([("BF16", 4)], "BF16"),
        ([("BF16", 3), ("F32", 2)], "F32"),  # bytes count, not elements
        ([("F32", 2), ("BF16", 3), ("BF16", 2)], "BF16"),
        ([("F16", 2), ("BF16", 2)], "F16"),  # a tie: the first
    ],
)
def test_common_dtype(dtypes: list[tuple[str, int]], common: str) -> None:
    assert common_dtype(source_of(*dtypes)) == common


def test_no_tensors_have_no_dtype() -> None:
    with pytest.raises(CheckpointError, match="toy holds no tensors"):
        common_dtype(ToySource())
