"""The JSON of a checkpoint: safetensors headers, the index of the shards, and how they can lie.

A safetensors file is 8 bytes of little-endian length, that many bytes of JSON, then the data of all
tensors back to back:

    {"__metadata__": {"format": "pt"},
     "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

Offsets count from the end of the header. Nothing here opens a file or imports torch: bytes come in,
facts come out, so the same checks hold for a file on disk and for a header fetched from the Hub.
All faults of a header are collected and raised together.

What the safetensors library refuses is refused here too. Refused besides, because other readers
would see something else, or because a copy would silently lose it: a name or key given twice,
`"__metadata__": null`, fields of a tensor beyond the three above, tensors written as lists, space
before the JSON, and shapes whose sizes overflow although one of them is 0. Accepted here only:
dtypes that are not known yet. Their bytes can be moved, if not read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_compose.checkpoint.source import DTYPE_BITS, TensorInfo, nbytes_of
from moe_compose.errors import CheckpointError

#: The longest header that the safetensors library reads, in bytes.
MAX_HEADER_BYTES = 100_000_000

_MAX_ELEMENTS = 2**63 - 1
_MAX_PROBLEMS = 10
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_PLAIN_NAME = re.compile(r"[^/\\:\x00]+\.safetensors")


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors header says, checked against the size of its file."""

    tensors: tuple[TensorInfo, ...]
    """In the order of their data."""
    offsets: tuple[int, ...]
    """Where the data of each begins, in bytes from the start of the file."""
    metadata: Mapping[str, str]
    """The free text pairs of `__metadata__`."""


def encode_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: 8 bytes of length, then compact JSON, padded to a multiple of 8.

    The padding is spaces; the tensors' data is laid out back to back in the order given.

    Args:
        tensors: what the file will hold, in order.
        metadata: free text pairs, written first under `__metadata__`; left out when empty.

    Returns:
        The header; the data of the first tensor starts right behind it.

    Example:
        >>> encode_header([TensorInfo.of("a", "F32", (2,))], {})[8:]
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for t in tensors:
        offsets = [begin, begin + t.nbytes]
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
        begin += t.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_length(first: bytes, file_bytes: int, where: str) -> int:
    """Bytes of JSON that the first 8 bytes of a file announce.

    Args:
        first: the first 8 bytes (more do no harm).
        file_bytes: size of the whole file.
        where: what to call the file in errors.

    Raises:
        CheckpointError: the file is too short, or the length is over the limit or over the file.
    """
    if first.startswith(b"version "):
        raise CheckpointError(
            f"{where} is a git-lfs pointer, not weights",
            hint="Fetch the weights with `git lfs pull`.",
        )
    if file_bytes < 8 or len(first) < 8:
        raise CheckpointError(f"{where}: a safetensors file has 8 bytes at least ({file_bytes})")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: the header may not be longer than {MAX_HEADER_BYTES} bytes ({length})",
            hint="This is probably not a safetensors file.",
        )
    if length > file_bytes - 8:
        raise CheckpointError(
            f"{where}: the header may not be longer than the file ({length} of {file_bytes} bytes)",
            hint="The file is truncated: download or write it again.",
        )
    return length


def parse_header(text: bytes, file_bytes: int, where: str) -> Header:
    """Read and check the JSON of a safetensors header.

    Args:
        text: the JSON, padding included, without the 8 bytes before it.
        file_bytes: size of the whole file: the tensors must fill it, without hole or overlap.
        where: what to call the file in errors.

    Raises:
        CheckpointError: with all faults of the header.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where}: a safetensors header begins with '{{' ({text[:1]!r})")
    entries = load_object(text, where, parse_int=_parse_int)
    metadata = entries.pop("__metadata__", {})
    problems = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"__metadata__ must map text to text ({shown(metadata)})")
    spans: list[tuple[int, int, TensorInfo]] = []
    for name, entry in entries.items():
        try:
            spans.append(_parse_entry(name, entry))
        except (ValueError, CheckpointError) as error:
            problems.append(f"tensor {shown(name)}: {error}")
    spans.sort(key=lambda span: span[:2])
    start = 8 + len(text)
    if not problems:
        problems = _cover_problems(spans, file_bytes - start)
    raise_problems(f"{where}: not a valid safetensors file", problems)
    return Header(
        tensors=tuple(info for _, _, info in spans),
        offsets=tuple(start + begin for begin, _, _ in spans),
        metadata=metadata,
    )


def parse_index(text: bytes, where: str) -> dict[str, str]:
    """The `weight_map` of a `model.safetensors.index.json`: tensor name to file name.

    Args:
        text: the file.
        where: what to call it in errors.

    Raises:
        CheckpointError: not an index, or one that names files outside of its own folder.
    """
    weight_map = load_object(text, where).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{where}: `weight_map` must map tensor names to file names ({shown(weight_map)})"
        )
    problems = [
        f"must name a .safetensors file of the same folder ({shown(file)}, for {shown(name)})"
        for name, file in weight_map.items()
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file)
    ]
    raise_problems(f"{where}: the index is not valid", problems)
    return weight_map


def load_object(text: bytes, where: str, **options: Any) -> dict[str, Any]:
    """Strict JSON: one object, UTF-8, no key twice, no text that cannot be written again.

    Args:
        text: the bytes of the file.
        where: what to call it in errors.
        **options: passed to `json.loads`.

    Raises:
        CheckpointError: with the line and column where that is known.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{where}: the same key stands there twice ({shown(twice)})")
        return found

    try:
        found = json.loads(text.decode(), object_pairs_hook=unique, **options)
        if b"\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        ) from None
    except UnicodeError as error:
        raise CheckpointError(f"{where}: not valid UTF-8 ({error})") from None
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: must be a JSON object ({shown(found)})")
    return found


def raise_problems(message: str, problems: Sequence[str], *, hint: str = "") -> None:
    """Raise a CheckpointError if there are problems; the first ten are shown.

    Args:
        message: what is wrong with the whole.
        problems: the single faults; nothing happens when there are none.
        hint: what to do next.

    Raises:
        CheckpointError: there are problems.
    """
    if not problems:
        return
    more = len(problems) - _MAX_PROBLEMS
    listed = [*problems[:_MAX_PROBLEMS], *([f"... and {more} more"] if more > 0 else [])]
    raise CheckpointError(message, problems=listed, hint=hint)


def shown(value: object) -> str:
    """A value as errors show it: escaped, and short whatever it is."""
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _parse_int(digits: str) -> int | float:
    """Whole numbers as the safetensors library reads them: to it, -0 and very long ones are not."""
    return float(digits) if len(digits) > 20 or digits == "-0" else int(digits)


def _parse_entry(name: str, entry: object) -> tuple[int, int, TensorInfo]:
    """Begin and end of the data, and the line itself; raises ValueError with the broken rule."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"must have dtype, shape and data_offsets, and no more ({shown(entry)})")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"dtype must be text ({shown(dtype)})")
    if not _naturals(shape):
        raise ValueError(f"shape must be a list of whole numbers ≥ 0 ({shown(shape)})")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets must be [begin, end], 0 ≤ begin ≤ end ({shown(offsets)})")
    if math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise ValueError(f"shape has more than 2^63 - 1 elements ({shown(shape)})")
    begin, end = offsets
    info = TensorInfo(name, dtype, tuple(shape), end - begin)
    expected = nbytes_of(dtype, info.shape) if dtype in DTYPE_BITS else info.nbytes
    if info.nbytes != expected:
        raise ValueError(
            f"{dtype} of shape {shown(shape)} takes {expected} bytes, "
            f"data_offsets give {info.nbytes}"
        )
    return begin, end, info


def _naturals(value: object) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  (twice as fast as all(); a header can hold 100,000 tensors)
        if type(item) is not int or item < 0:
            return False
    return True


def _cover_problems(spans: Sequence[tuple[int, int, TensorInfo]], data_bytes: int) -> list[str]:
    """Where sorted spans leave holes, overlap, or do not end with the file."""
    problems, at = [], 0
    for begin, end, info in spans:
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            problems.append(
                f"tensor {shown(info.name)}: data_offsets [{begin}, {end}] {fault} "
                f"(must begin at {at})"
            )
        at = max(at, end)
    if at > data_bytes:
        problems.append(f"truncated: the tensors take {at} bytes, the file holds {data_bytes}")
    elif at < data_bytes:
        problems.append(f"{data_bytes - at} bytes at the end of the file belong to no tensor")
    return problems
