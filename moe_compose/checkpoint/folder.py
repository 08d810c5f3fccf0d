"""The files of a checkpoint: which of them are the weights, and whether they agree with each other.

Readers of this format look for weights in this order, and so does this module:

1. `model.safetensors.index.json` names them;
2. else `model.safetensors`;
3. else every `*.safetensors` of the folder, which must not name a tensor twice.

Where readers would disagree, such as on a tensor that lies in a shard but not in the index, the
checkpoint is refused. All of it works on `Files`, so that a repository on the Hub, of which only a
few kilobytes are fetched, is held to the same rules as a folder.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from moe_compose.checkpoint.header import (
    MAX_HEADER_BYTES,
    Header,
    header_length,
    load_object,
    parse_header,
    parse_index,
    raise_problems,
    shown,
)
from moe_compose.checkpoint.source import CHUNK_BYTES, Extent
from moe_compose.checkpoint.write_state import STATE_NAME
from moe_compose.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TEMPLATE_FOLDER = "additional_chat_templates"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_MAX_CONFIG_BYTES = 16 << 20
_FIRST_READ_BYTES = 64 << 10  # most headers are shorter, so that one read, or one request, does
_SHARD = re.compile(r"(?P<stem>.+)-[0-9]+-of-(?P<total>[0-9]{1,9})\.safetensors")

_LAYOUT = "A checkpoint is a folder in transformers' layout: config.json beside *.safetensors."
_AGAIN = "The checkpoint is not complete: download or write it again."

log = logging.getLogger("moe_compose")


class Files(Protocol):
    """The files of one checkpoint, wherever they are."""

    @property
    def label(self) -> str:
        """What people call it."""

    @property
    def path(self) -> Path | None:
        """The folder, if it is on this machine."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every top-level file, by name."""

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes, or a CheckpointError."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """A folder on this machine."""

    path: Path
    label: str
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, path: Path, label: str) -> LocalFiles:
        """List a folder: regular files, and links to such (the Hub's cache is made of links)."""
        try:
            with os.scandir(path) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise CheckpointError(f"cannot list {label} ({error.strerror})") from error
        return cls(path, label, sizes)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        return b"".join(read_pieces(Extent(self.path / name, offset, nbytes), CHUNK_BYTES))


def read_pieces(extent: Extent, step: int) -> Iterator[bytearray]:
    """The bytes of an extent in fresh buffers of `step` bytes, the last one shorter.

    The file is open while the pieces are taken, and not longer. Each call has a file position of
    its own, so threads may read the same file.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter since its header was read.
    """
    name = f"{extent.path.parent.name}/{extent.path.name}"
    try:
        with extent.path.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            for done in range(0, extent.nbytes, step):
                piece = bytearray(min(step, extent.nbytes - done))
                missing = memoryview(piece)
                while got := file.readinto(missing):
                    missing = missing[got:]
                if missing:
                    raise CheckpointError(
                        f"{name} ends {len(missing)} bytes too early: it changed after opening",
                        hint="Wait until nothing writes to the folder, and open it again.",
                    )
                yield piece
    except OSError as error:
        raise CheckpointError(f"cannot read {name} ({error.strerror})") from error


def read_config(files: Files) -> dict[str, Any]:
    """`config.json`, as it is.

    Raises:
        CheckpointError: missing, too large, or not one JSON object.
    """
    if CONFIG_NAME not in files.sizes:
        raise CheckpointError(f"{files.label} holds no {CONFIG_NAME}", hint=_LAYOUT)
    return load_object(_read_whole(files, CONFIG_NAME, _MAX_CONFIG_BYTES), _at(files, CONFIG_NAME))


def read_headers(files: Files) -> dict[str, Header]:
    """The headers of all files of weights, by file name in natural order, checked as a whole.

    Raises:
        CheckpointError: no weights, pickles only, an unfinished write, a damaged file, or files
            that disagree with each other or with the index.
    """
    _refuse_unfinished(files)
    weight_map = None
    if INDEX_NAME in files.sizes:
        text = _read_whole(files, INDEX_NAME, MAX_HEADER_BYTES)
        weight_map = parse_index(text, _at(files, INDEX_NAME))
    names = _weight_names(files, weight_map)
    headers, problems = {}, []
    with ThreadPoolExecutor(max_workers=8) as pool:  # eight requests at a time, on the Hub
        for name, found in zip(names, pool.map(partial(_try_header, files), names), strict=True):
            if isinstance(found, CheckpointError):
                problems.append(found)
            else:
                headers[name] = found
    if len(problems) == 1:
        raise problems[0]
    raise_problems(f"{files.label}: damaged files", [str(problem) for problem in problems])
    if weight_map is None:
        _check_no_tensor_twice(files, headers)
    else:
        _check_index(files, headers, weight_map)
    return headers


def _refuse_unfinished(files: Files) -> None:
    """A folder with the writer's note in it, or half a file and no sign of the rest."""
    complete = INDEX_NAME in files.sizes or SINGLE_NAME in files.sizes
    signs = [n for n in files.sizes if n.endswith(".safetensors.part") and not complete]
    signs += [n for n in files.sizes if n == STATE_NAME]
    if signs:
        raise CheckpointError(
            f"{files.label} looks like an unfinished write ({', '.join(map(shown, signs[:3]))})",
            hint="Continue with --resume, or start again with --overwrite.",
        )


def _weight_names(files: Files, weight_map: Mapping[str, str] | None) -> list[str]:
    """The files of weights, in natural order; raises where there are none, or some are missing."""
    there = {n for n in files.sizes if n.endswith(".safetensors") and not n.startswith(".")}
    if weight_map is not None:
        names, reason = set(weight_map.values()), f"not in {INDEX_NAME}"
        missing = [f"{shown(name)} is in {INDEX_NAME} only" for name in _natural(names - there)]
    elif SINGLE_NAME in there:
        names, reason, missing = {SINGLE_NAME}, f"{SINGLE_NAME} is there and no index", []
    else:
        names, reason, missing = there, "", _incomplete_sets(there)
    raise_problems(f"{files.label}: files of weights are missing", missing, hint=_AGAIN)
    if not names:
        _raise_no_weights(files)
    if left := _natural(there - names):
        log.warning("%s: %s left out: %s", files.label, ", ".join(map(shown, left)), reason)
    return _natural(names)


def _incomplete_sets(names: set[str]) -> list[str]:
    """Files named `…-00001-of-00003` say how many there should be."""
    counts: dict[tuple[str, str], int] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        key = match["stem"], match["total"]
        counts[key] = counts.get(key, 0) + 1
    return [
        f"{count} of {int(total)} files {shown(stem)}-*-of-{total}.safetensors are there"
        for (stem, total), count in sorted(counts.items())
        if count != int(total)
    ]


def _raise_no_weights(files: Files) -> None:
    pickles = [name for name in files.sizes if name.lower().endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{files.label} holds weights as pickles only ({', '.join(map(shown, pickles[:3]))}): "
            "a pickle can run any code, so it is never opened",
            hint="Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) writes safetensors.",
        )
    raise CheckpointError(
        f"{files.label} holds no weights (no *.safetensors among {len(files.sizes)} files)",
        hint=f"{_LAYOUT} Pickles (*.bin, *.pt) are neither downloaded nor read.",
    )


def _try_header(files: Files, name: str) -> Header | CheckpointError:
    where, size = _at(files, name), files.sizes[name]
    try:
        first = files.read(name, 0, min(size, _FIRST_READ_BYTES))
        length = header_length(first, size, where)
        rest = 8 + length - len(first)
        text = first[8 : 8 + length]
        if rest > 0:
            text += files.read(name, len(first), rest)
        return parse_header(text, size, where)
    except CheckpointError as error:
        return error


def _check_no_tensor_twice(files: Files, headers: Mapping[str, Header]) -> None:
    seen: dict[str, str] = {}
    problems = [
        f"tensor {shown(info.name)} is in {first} and in {name}"
        for name, header in headers.items()
        for info in header.tensors
        if (first := seen.setdefault(info.name, name)) != name
    ]
    raise_problems(
        f"{files.label}: without an index, a tensor may be in one file only",
        problems,
        hint=f"Keep one set of files, or add the {INDEX_NAME} that says which counts.",
    )


def _check_index(
    files: Files, headers: Mapping[str, Header], weight_map: Mapping[str, str]
) -> None:
    """Index and headers must say the same: no tensor missing, none left over, none elsewhere."""
    problems = []
    found = set()
    for name, header in headers.items():
        for info in header.tensors:
            if weight_map.get(info.name) == name:
                found.add(info.name)
            else:
                problems.append(
                    f"tensor {shown(info.name)} is in {name}, the index does not say so"
                )
    problems += [
        f"tensor {shown(name)} is not in {file}, the index says so"
        for name, file in weight_map.items()
        if name not in found
    ]
    raise_problems(f"{files.label}: {INDEX_NAME} and the files disagree", problems)


def _read_whole(files: Files, name: str, limit: int) -> bytes:
    size = files.sizes[name]
    if size > limit:
        raise CheckpointError(f"{_at(files, name)}: may not be larger than {limit} bytes ({size})")
    return files.read(name, 0, size)


def _at(files: Files, name: str) -> str:
    return f"{files.label}/{name}"


def _natural(names: set[str]) -> list[str]:
    """`model-2` before `model-10`: runs of digits compare by length first."""

    def key(name: str) -> list[tuple[int, str]]:
        parts = re.split("0*([0-9]+)", name)
        return [(len(part) * (i % 2), part) for i, part in enumerate(parts)]

    return sorted(names, key=key)
