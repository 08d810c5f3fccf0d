"""What a checkpoint is to the rest of the package: a config, named tensors, and a way to get at
their bytes.

Nothing here knows what is *in* a checkpoint, and nothing imports torch until values are asked for:
shapes, dtypes and byte ranges are enough to plan surgery and to carry it out wherever bytes only
move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_compose.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: Bits of one element, by the dtype's name in a safetensors header. A dtype that is not here can
#: still be copied as bytes.
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

#: The dtypes that arithmetic is defined on, and their names in torch. Everything else is only ever
#: moved.
FLOAT_DTYPES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}

#: All dtypes whose values torch can hold.
TORCH_DTYPES: Mapping[str, str] = {
    **FLOAT_DTYPES,
    "BOOL": "bool", "C64": "complex64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

#: Bytes that a stream hands over at a time: large enough that Python's share is small, small enough
#: to forget.
CHUNK_BYTES = 32 << 20


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a known dtype: `elements × bits / 8`.

    Raises:
        KeyError: `dtype` is none of `DTYPE_BITS`.
        CheckpointError: the elements do not fill whole bytes (a sub-byte dtype with an odd count).
    """
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(
            f"a {dtype} tensor of shape {list(shape)} does not fill whole bytes ({bits} bits)"
        )
    return bits // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; imports torch.

    Raises:
        CheckpointError: torch has no such dtype. Such tensors can be copied and selected from, not
    computed with.
    """
    import torch

    found = getattr(torch, TORCH_DTYPES.get(dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"torch cannot hold values of dtype {dtype}; such tensors can only be copied as bytes"
        )
    return found


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A line of a safetensors header: name, dtype (safetensors' spelling), shape, and size in
    bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        """A tensor of a known dtype, its size computed."""
        return cls(name, dtype, shape, nbytes_of(dtype, shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


class TensorSource(Protocol):
    """Anything tensors can be read from. A `Checkpoint` is one, and so is a `Plan` that was never
    written.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json` as it is (or will be) on disk."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name, in the order of the source."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Files that are neither weights, nor their index, nor the config: tokenizer, generation
        config, card, licence.
        """

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Local files that values are read from."""

    @property
    def label(self) -> str:
        """What people call it: the folder's name or the Hub id. Never an absolute path."""

    def digest(self) -> str:
        """Hex SHA-256 of what can be known without reading weights: config, and names, dtypes and
        shapes of all tensors.
        """

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        """Where the tensor's bytes lie, in order; None when its values must be computed first."""

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's values as flat pieces, in order, each at most about `CHUNK_BYTES` where the
        source allows it.
        """

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its shape and dtype, on the CPU."""


def common_dtype(source: TensorSource) -> str:
    """The dtype most of the source's bytes have; at a tie, the one that comes first.

    Raises:
        CheckpointError: the source holds no tensors.
    """
    sizes: dict[str, int] = {}
    for info in source.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not sizes:
        raise CheckpointError(f"{source.label} holds no tensors")
    return max(sizes, key=lambda dtype: sizes[dtype])
