"""`RouterStats`: what a router is given on each expert's text, kept expert by expert.

One safetensors file, `router_stats.safetensors`:

    __metadata__              the record: experts in order, their rows' lengths, text, layers
    layers.3.py.second        Σ x xᵀ over the text of expert `py`: upper triangle, row by row, fp32
    layers.3.py.sum           Σ x, fp32 [D]

with x the input of layer 3's router while expert `py` is forced in every layer. It takes
layers · experts · D · (D + 3) · 2 bytes. Nothing is summed over experts until a system is solved.
So an expert's sums can be left out, and no trace of its text remains; or added, without the text of
the others; and the bytes of those that stay never change.

Shape suffixes: D what the router is given, N = D·(D + 1)/2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compose.calibration.reading import DataFile
from moe_compose.checkpoint.header import header_length, parse_header
from moe_compose.checkpoint.source import Extent, TensorInfo
from moe_compose.composition.blocks import StatsFile, layout_of, second_name, sum_name, unpacked
from moe_compose.composition.options import Method
from moe_compose.errors import CheckpointError, OptionError, WriteError

#: The file's name beside a checkpoint.
STATS_NAME = "router_stats.safetensors"

#: Fields that the record holds as they are.
_PLAIN = ("method", "ridge", "shared", "dtype")

#: Key of the record in the file's metadata, and its format; raised when it comes to mean something
#: else.
_KEY, _FORMAT = "moe_compose.router_stats", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertText:
    """An expert, and what is known of its text.

    Attributes:
        name: unique among the experts.
        scale: length of its row (DUME's 1/temperature).
        tokens: padding not counted; 0: it has no text, and no sums.
        text: digest of the token ids.
        files: where the text came from.
    """

    name: str
    scale: float = 1.0
    tokens: int = 0
    text: str = ""
    files: tuple[DataFile, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterStats:
    """Second moments of router inputs, by layer and expert; on disk until they are asked for.

    Attributes:
        experts: all of the MoE's, in the order of their rows.
        widths: sparse layer → D.
        method, ridge: how rows follow (see `RoutingOptions`).
        shared: SHA-256 of all tensors but experts and routers; sums of two models do not add up.
        dtype: what the model computed in.
        blocks: tensor of the file → where its bytes lie.
    """

    experts: tuple[ExpertText, ...]
    widths: Mapping[int, int]
    method: Method
    ridge: float
    shared: str
    dtype: str
    blocks: Mapping[str, Extent]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the experts, in order."""
        return tuple(e.name for e in self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(b.nbytes for b in self.blocks.values())

    def second(self, layer: int, name: str) -> Tensor:
        """Σ x xᵀ of an expert's text, fp64 `[D, D]`."""
        width = self.widths[layer]
        return unpacked(self._read(second_name(layer, name)), width)

    def sum(self, layer: int, name: str) -> Tensor:
        """Σ x of an expert's text, fp64 `[D]`."""
        return self._read(sum_name(layer, name))

    def select(self, names: Sequence[str]) -> RouterStats:
        """Some of the experts, in this order. Nothing of the others is left.

        Raises:
            OptionError: unknown names, or one given twice.
        """
        by_name = {e.name: e for e in self.experts}
        if unknown := [n for n in names if n not in by_name]:
            raise OptionError(
                f"no statistics of {', '.join(unknown)}; there are {', '.join(self.names)}"
            )
        return self._with(tuple(by_name[n] for n in names), self.blocks)

    def without(self, name: str) -> RouterStats:
        """All but one expert, and no trace of its text.

        Raises:
            OptionError: no such expert.
        """
        self.select([name])
        return self.select([n for n in self.names if n != name])

    def renamed(self, old: str, new: str) -> RouterStats:
        """With another name for one expert.

        Raises:
            OptionError: no such expert, or a name that is taken.
        """
        self.select([old])
        blocks = dict(self.blocks)
        for layer in self.widths:
            for name in (second_name, sum_name):
                if name(layer, old) in blocks:
                    blocks[name(layer, new)] = blocks.pop(name(layer, old))
        experts = (replace(e, name=new) if e.name == old else e for e in self.experts)
        return self._with(tuple(experts), blocks)

    def join(self, other: RouterStats) -> RouterStats:
        """These experts, then those of `other`.

        Raises:
            OptionError: they were not measured on one model in one way, or share an expert's name;
                all differences at once.
        """
        problems = [
            f"{what}: {mine} and {theirs}"
            for what in ("widths", "method", "ridge", "shared", "dtype")
            if (mine := getattr(self, what)) != (theirs := getattr(other, what))
        ]
        if problems:
            raise OptionError(
                "these router statistics do not belong together",
                problems=problems,
                hint="Measure the new expert inside of the model that it is added to.",
            )
        return self._with((*self.experts, *other.experts), {**self.blocks, **other.blocks})

    def scaled(self, scales: Mapping[str, float]) -> RouterStats:
        """With other lengths of some experts' rows.

        Raises:
            OptionError: no such expert.
        """
        self.select(list(scales))
        experts = (replace(e, scale=scales.get(e.name, e.scale)) for e in self.experts)
        return replace(self, experts=tuple(experts))

    def save(self, folder: str | Path) -> Path:
        """Write the file into a folder, in one step, bytes moved from file to file; returns its
        path.

        Raises:
            WriteError: it is one of those read from, or cannot be written.
        """
        path = Path(folder) / STATS_NAME
        if any(path.exists() and b.path.samefile(path) for b in self.blocks.values()):
            raise WriteError(f"{path} is read from", hint="Give another folder.")
        with self.file(path) as file:
            for name in file.offsets:
                file.copy(name, self.blocks[name])
        return path

    @classmethod
    def load(cls, path: str | Path) -> RouterStats:
        """Open the file, or the one in a folder; sums stay on the disk.

        Raises:
            CheckpointError: there is none, or it is damaged, or of another format.
        """
        path = Path(path) / STATS_NAME if Path(path).is_dir() else Path(path)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                first = file.read(8)
                text = file.read(header_length(first, size, path.name))
        except OSError as e:
            raise CheckpointError(f"cannot read {path.name} ({e.strerror})") from e
        header = parse_header(text, size, path.name)
        infos = zip(header.tensors, header.offsets, strict=True)
        blocks = {t.name: Extent(path, at, t.nbytes) for t, at in infos}
        stats = _from_json(header.metadata.get(_KEY, "null"), blocks, path.name)
        if {t.name: t.shape for t in header.tensors} != {t.name: t.shape for t in layout(stats)}:
            raise CheckpointError(f"{path.name}: sums and record do not belong together")
        return stats

    def file(self, path: Path) -> StatsFile:
        """The file with this record, to be filled."""
        text = json.dumps(self.to_json(), ensure_ascii=False, sort_keys=True)
        return StatsFile(path, layout(self), {_KEY: text})

    def to_json(self) -> dict[str, Any]:
        """The record, plain values."""
        plain = {"format": _FORMAT, **{n: getattr(self, n) for n in _PLAIN}}
        widths = {str(i): d for i, d in self.widths.items()}
        return {**plain, "widths": widths, "experts": [asdict(e) for e in self.experts]}

    def _with(self, experts: tuple[ExpertText, ...], blocks: Mapping[str, Extent]) -> RouterStats:
        names = [e.name for e in experts]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise OptionError(f"experts must have names of their own ({', '.join(twice)} twice)")
        found = replace(self, experts=experts)
        return replace(found, blocks={t.name: blocks[t.name] for t in layout(found)})

    def _read(self, name: str) -> Tensor:
        block = self.blocks[name]
        try:
            with block.path.open("rb") as file:
                file.seek(block.offset)
                data = bytearray(file.read(block.nbytes))
        except OSError as e:
            raise CheckpointError(f"cannot read {block.path.name} ({e.strerror})") from e
        return torch.frombuffer(data, dtype=torch.float32).double()


def layout(stats: RouterStats) -> list[TensorInfo]:
    """Every tensor of the file."""
    return layout_of(stats.widths, [e.name for e in stats.experts if e.tokens])


def _from_json(text: str, blocks: Mapping[str, Extent], where: str) -> RouterStats:
    """The record that `to_json` made."""
    try:
        found = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{where} is damaged: {e}") from e
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        have = found.get("format") if isinstance(found, dict) else None
        raise CheckpointError(f"{where} has format {have}; this version reads {_FORMAT}")
    try:
        experts = tuple(
            ExpertText(**{**e, "files": tuple(DataFile(**f) for f in e["files"])})
            for e in found["experts"]
        )
        widths = {int(i): int(d) for i, d in found["widths"].items()}
        plain = {name: found[name] for name in _PLAIN}
        return RouterStats(experts=experts, widths=widths, blocks=blocks, **plain)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{where} is damaged: {e}") from e
