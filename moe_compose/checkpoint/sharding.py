"""Which tensor goes into which file, and where in it: decided from names, dtypes and shapes alone.

A sharded checkpoint is a list of safetensors files and one index that says which tensor is in
which. Everything about it can be known before a single value is: the names of the files need their
count (`model-00001-of-00004`), and a header needs the sizes of its tensors. So the whole layout is
fixed first; writing then only fills in bytes, in any order, by any number of workers.

Tensors fill shards greedily, in the order of the source, which keeps a layer's tensors in one or
two files. Inside a shard the dtypes with the widest elements come first, as safetensors' own writer
does: data is back to back, and this way each tensor starts at a multiple of its element size
    without any padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_compose.checkpoint.header import encode_header
from moe_compose.checkpoint.source import DTYPE_BITS, TensorInfo

#: Bytes of tensors in one file, unless asked otherwise: what the Hub's own tools default to.
SHARD_SIZE = 5_000_000_000

#: The key in a shard's metadata that names the plan it belongs to.
DIGEST_KEY = "moe_compose.digest"


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor and the position of its first byte in the shard's file."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written: its header, and where each tensor goes.

    Attributes:
        name: the file's name.
        header: the bytes before the data.
        placements: the tensors, in the order of their bytes.
        nbytes: bytes of data.
    """

    name: str
    header: bytes
    placements: tuple[Placement, ...]
    nbytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.nbytes


def plan_shards(tensors: Iterable[TensorInfo], shard_size: int, digest: str) -> tuple[Shard, ...]:
    """Lay tensors out in files of at most `shard_size` bytes of tensor data.

    Args:
        tensors: what will be written, in the order of the source.
        shard_size: bytes; a tensor larger than this gets a shard of its own.
        digest: of the source, stored in every shard, so that shards of different plans are never
            mixed.

    Returns:
        The shards, in order; a single one is named `model.safetensors`. Without tensors, one empty
        shard.

    Example:
        >>> infos = [TensorInfo.of(name, "F32", (2,)) for name in "abc"]
        >>> [(s.name, s.nbytes) for s in plan_shards(infos, 16, "")]
        [('model-00001-of-00002.safetensors', 16), ('model-00002-of-00002.safetensors', 8)]
    """
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if groups[-1] and filled + info.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    return tuple(
        _lay_out(_shard_name(i, len(groups)), group, digest) for i, group in enumerate(groups, 1)
    )


def encode_index(shards: Iterable[Shard], tensors: Mapping[str, TensorInfo]) -> bytes:
    """The index that ties shards together, as transformers reads it.

    Args:
        shards: from `plan_shards`.
        tensors: the same tensors, in the order that the index lists them.

    Returns:
        JSON text: `metadata` (bytes and elements in total) and `weight_map` (tensor name to file
        name).
    """
    file_of = {placed.info.name: shard.name for shard in shards for placed in shard.placements}
    index = {
        "metadata": {
            "total_size": sum(info.nbytes for info in tensors.values()),
            "total_parameters": sum(info.numel for info in tensors.values()),
        },
        "weight_map": {name: file_of[name] for name in tensors},
    }
    return encode_json(index)


def encode_json(content: Mapping[str, object]) -> bytes:
    """JSON as checkpoints carry it: two spaces, any script unescaped, keys in the order given, a
    newline at the end.
    """
    return (json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n").encode()


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _lay_out(name: str, group: list[TensorInfo], digest: str) -> Shard:
    group = sorted(group, key=_alignment, reverse=True)
    header = encode_header(group, {"format": "pt", DIGEST_KEY: digest})
    placements = []
    offset = len(header)
    for info in group:
        placements.append(Placement(info, offset))
        offset += info.nbytes
    return Shard(name, header, tuple(placements), offset - len(header))


def _alignment(info: TensorInfo) -> int:
    """The largest power of two that divides an element's bits: sorted by it, descending, every
    tensor is aligned to it.

    An unknown dtype's width follows from its size; where that is not a whole number of bytes, one
    byte is as good as any.
    """
    bits = DTYPE_BITS.get(info.dtype)
    if bits is None:
        whole = info.numel and info.nbytes % info.numel == 0
        bits = 8 * (info.nbytes // info.numel) if whole else 8
    return bits & -bits
