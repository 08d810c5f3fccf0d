"""Checkpoint: a folder or a model of the Hub as a source of tensors.

Opening reads `config.json`, the index and the safetensors headers, and checks them against each
other and against the sizes of the files; it reads no weights and does not import torch. Values are
read into fresh buffers: a memory map would be shorter, but its pages count as resident until the
system wants them back, and streaming a large model must not look like holding it.

Pickles are never opened, and code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.folder import (
    CONFIG_NAME,
    PICKLES,
    TEMPLATE_FOLDER,
    Files,
    LocalFiles,
    read_config,
    read_headers,
    read_pieces,
)
from moe_compose.checkpoint.header import shown
from moe_compose.checkpoint.source import CHUNK_BYTES, Extent, TensorInfo, torch_dtype
from moe_compose.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    import torch

    from moe_compose.checkpoint.hub import RemoteFiles

log = logging.getLogger("moe_compose")

_NOT_CARRIED = (
    *(".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".part", ".index.json"),
    *PICKLES,
)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@]+))?", re.ASCII)
_LOOKS_LIKE_PATH = re.compile(r"[./~]|.*[/\\]$|[A-Za-z]:|.*\\", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Checkpoint:
    """A checkpoint whose tensors are bytes of files: a `TensorSource`. Made by `Checkpoint.open`.

    Attributes:
        label: the folder's name or the Hub id.
        config: `config.json` as it is.
        tensors: every tensor by name, file after file, in the order of the data.
        files: what travels along with the weights, by name relative to the folder; empty when only
            headers were fetched.
        path: the folder; None when only headers were fetched.
        revision: the commit on the Hub; None for a folder that was given as one.
        weight_files: the safetensors files, in the order of `tensors`; empty when only headers were
            fetched.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    path: Path | None
    revision: str | None
    weight_files: tuple[Path, ...]
    _extents: Mapping[str, Extent]
    _remote: RemoteFiles | None = None

    @classmethod
    def open(
        cls, path_or_id: str | Path, *, revision: str | None = None, headers_only: bool = False
    ) -> Checkpoint:
        """Open a folder, or a model of the Hub.

        Args:
            path_or_id: a folder; where there is none, `org/name` or `org/name@revision` on the Hub.
            revision: branch, tag or commit on the Hub.
            headers_only: of a model on the Hub, fetch config and headers only, some kilobytes,
                instead of downloading it into the Hub's cache: enough to inspect and to plan, not
                to read values. Makes no difference to a folder.

        Returns:
            The checkpoint; every header checked, no weights read.

        Raises:
            CheckpointError: missing, out of reach, no checkpoint, pickles only, damaged, hostile.
            OptionError: a revision for a folder, or two different ones.

        Example:
            >>> dense = Checkpoint.open("Qwen/Qwen3-0.6B")  # doctest: +SKIP
            >>> dense.tensors["model.norm.weight"].shape  # doctest: +SKIP
            (1024,)
        """
        files, remote = files_of(path_or_id, revision, headers_only=headers_only)
        return cls._of(files, remote)

    @classmethod
    def _of(cls, files: Files, remote: RemoteFiles | None) -> Checkpoint:
        headers = read_headers(files)
        config = read_config(files)
        tensors, extents = {}, {}
        for file, header in headers.items():
            for info, offset in zip(header.tensors, header.offsets, strict=True):
                tensors[info.name] = info
                if files.path is not None:
                    extents[info.name] = Extent(files.path / file, offset, info.nbytes)
        return cls(
            label=files.label,
            config=MappingProxyType(config),
            tensors=MappingProxyType(tensors),
            files=MappingProxyType({} if files.path is None else _carried_files(files.path)),
            path=files.path,
            revision=remote.commit if remote is not None else None,
            weight_files=() if files.path is None else tuple(files.path / file for file in headers),
            _extents=extents,
            _remote=remote,
        )

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, {len(self.tensors)} tensors, {self.total_bytes} bytes)"

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def document(self, name: str) -> Path | None:
        """A small file beside the weights, whether it travels along or not, such as
        `validation.json`; None where there is none. Of a model on the Hub it is fetched.

        Raises:
            CheckpointError: the Hub is out of reach.
        """
        path = self.path / name if self.path is not None else None
        if path is not None and path.is_file():
            assert self.path is not None
            return path if _stays_inside(self.path, path) else None
        return self._remote.fetch(name) if self._remote is not None else None

    def digest(self) -> str:
        """Hex SHA-256 of config, names, dtypes and shapes; the same however they are sharded."""
        known = {
            "config": dict(self.config),
            "tensors": {info.name: [info.dtype, info.shape] for info in self.tensors.values()},
        }
        text = json.dumps(known, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        """Where the tensor's bytes lie; None when only headers were fetched.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._info(name)
        return (self._extents[name],) if name in self._extents else None

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's values as flat pieces of at most `CHUNK_BYTES`; none for an empty tensor.

        Raises:
            CheckpointError: no such tensor, not downloaded, unreadable, or foreign to torch.
        """
        import torch

        info, extent = self._on_disk(name)
        dtype = torch_dtype(info.dtype)
        step = CHUNK_BYTES - CHUNK_BYTES % dtype.itemsize
        return (torch.frombuffer(p, dtype=dtype) for p in read_pieces(extent, step))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its shape and dtype, on the CPU.

        Raises:
            CheckpointError: no such tensor, not downloaded, unreadable, or foreign to torch.
        """
        import torch

        info, extent = self._on_disk(name)
        dtype = torch_dtype(info.dtype)
        if extent.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        [piece] = read_pieces(extent, extent.nbytes)
        return torch.frombuffer(piece, dtype=dtype).reshape(info.shape)

    def _on_disk(self, name: str) -> tuple[TensorInfo, Extent]:
        info = self._info(name)
        if name not in self._extents:
            raise CheckpointError(
                f"{self.label}: the weights were not downloaded, so {shown(name)} cannot be read",
                hint="Open it without headers_only.",
            )
        return info, self._extents[name]

    def _info(self, name: str) -> TensorInfo:
        if name in self.tensors:
            return self.tensors[name]
        close = difflib.get_close_matches(name, self.tensors, n=3)
        raise CheckpointError(
            f"{self.label} has no tensor {shown(name)}",
            hint=f"Did you mean {' or '.join(map(shown, close))}?" if close else "",
        )


def files_of(
    path_or_id: str | Path, revision: str | None = None, *, headers_only: bool = False
) -> tuple[Files, RemoteFiles | None]:
    """Where the files of a folder, or of a model or adapter on the Hub, are: on this machine, after
    a download if need be; and on the Hub, unless it is a folder.

    Raises:
        CheckpointError: missing, or out of reach.
        OptionError: a revision for a folder, or two different ones.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path_or_id)))
    if os.path.isdir(folder) and os.fspath(path_or_id):
        if revision is not None:
            raise OptionError(f"a folder has no revisions ({revision!r} for {path_or_id})")
        return LocalFiles.of(folder, folder.name or "/"), None
    repo, revision = _hub_id(path_or_id, folder, revision)
    from moe_compose.checkpoint import hub

    if headers_only and (remote := hub.listed(repo, revision)) is not None:
        return remote, remote
    path, commit = hub.download(repo, revision)
    local = LocalFiles.of(path, hub.label_of(repo, revision))
    return local, hub.RemoteFiles(repo, commit, local.label, local.sizes)


def _carried_files(folder: Path) -> dict[str, Path]:
    """What travels along with the weights: tokenizer, chat templates, card, licence, ...

    Paths by name relative to the folder, sorted; without hidden files and weights of any kind, and
    without links that lead out of the folder: a result is made to be shared, and must not take
    along what a link in a stranger's folder points to.
    """
    names = set(LocalFiles.of(folder, folder.name).sizes) - {CONFIG_NAME, "validation.json"}
    templates = folder / TEMPLATE_FOLDER
    inside = LocalFiles.of(templates, TEMPLATE_FOLDER).sizes if templates.is_dir() else {}
    names |= {f"{TEMPLATE_FOLDER}/{name}" for name in inside}
    return {
        name: folder / name
        for name in sorted(names)
        if not name.rpartition("/")[2].startswith(".")
        and not name.lower().endswith(_NOT_CARRIED)
        and _stays_inside(folder, folder / name)
    }


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether a file lies in the folder, or, in the Hub's cache, among the blobs beside it."""
    target, home = path.resolve(), folder.resolve()
    inside = target.is_relative_to(home) or target.parent == home.parent.parent / "blobs"
    if not inside:
        log.warning("%s is a link that leads out of the folder; it is left behind", path.name)
    return inside


def _hub_id(path_or_id: str | Path, folder: Path, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision; raises for what must have been meant as a folder."""
    given = os.fspath(path_or_id)
    if given and os.path.lexists(folder):
        raise CheckpointError(
            f"a checkpoint is a folder, {given} is none",
            hint="Give the folder that holds config.json and the *.safetensors files.",
        )
    if isinstance(path_or_id, Path) or _LOOKS_LIKE_PATH.match(given):
        raise CheckpointError(
            f"there is no folder {given}",
            hint="Check the path; models on the Hub are given as org/name.",
        )
    match = _HUB_ID.fullmatch(given)
    if match is None:
        raise CheckpointError(
            f"neither a folder nor a Hub id ({shown(given)})",
            hint="Hub ids have the form org/name or org/name@revision.",
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise OptionError(f"two revisions are given ({match['revision']} and {revision})")
    return match["repo"], revision or match["revision"]
