"""Statistics as a folder, written so that whoever looks sees the whole of it or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_compose.calibration.record import Record
from moe_compose.calibration.similarity import file_of
from moe_compose.calibration.stats import ExpertStats, LayerStats
from moe_compose.checkpoint.copying import os_errors, sync_folder, write_file
from moe_compose.errors import CheckpointError, WriteError

RECORD, TABLES = "stats.json", "stats.safetensors"


def save(stats: ExpertStats, folder: Path) -> Path:
    """Write statistics, and the similarities that they point to, into a new folder.

    Raises:
        WriteError: the folder is there and not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WriteError(f"{folder} is there already", hint="Give a new folder, or remove it.")
    with os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if stats.record.sample and stats.folder is not None and stats.folder != folder:
            for layer in stats.layers:
                shutil.copyfile(stats.folder / file_of(layer), folder / file_of(layer))
    write_tables(stats, folder)
    return folder


def write_tables(stats: ExpertStats, folder: Path) -> None:
    """The sums and the record; the record last."""
    tables = {
        f"{layer}.{name}": t for layer, s in stats.layers.items() for name, t in s.tensors.items()
    }
    write_file(folder / TABLES, _encoded(tables))
    text = json.dumps(stats.record.to_json(), indent=2, ensure_ascii=False)
    write_file(folder / RECORD, f"{text}\n".encode())


def load(folder: Path) -> ExpertStats:
    """Read statistics; similarities stay on the disk until they are asked for.

    Raises:
        CheckpointError: there are none, or they are damaged or of another format.
    """
    if not (folder / RECORD).is_file():
        hint = f"It must be a folder with {RECORD}, as moe-compose calibrate writes it."
        raise CheckpointError(f"{folder} holds no statistics of experts", hint=hint)
    try:
        record = Record.from_json(json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"cannot read {folder.name}/{RECORD}: {e}") from e
    by_layer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_tables(folder / TABLES).items():
        layer, _, field = name.partition(".")
        by_layer.setdefault(int(layer), {})[field] = tensor
    try:
        layers = {i: LayerStats(**tables) for i, tables in sorted(by_layer.items())}
    except TypeError as e:
        raise CheckpointError(f"{folder.name}/{TABLES} is damaged: {e}") from e
    _check_shapes(layers, record, folder.name)
    return ExpertStats(record=record, layers=layers, folder=folder if record.sample else None)


def is_stats(folder: Path) -> bool:
    """Whether a folder is one of statistics, and holds nothing else."""
    if not (folder / RECORD).is_file():
        return False
    known = (RECORD, TABLES, "job.json")
    ours = ("similarity-", "layer-")
    return all(p.name in known or p.name.startswith(ours) for p in folder.iterdir())


def write_layer(path: Path, stats: LayerStats) -> None:
    """One finished layer, for a run that may be interrupted."""
    write_file(path, _encoded(stats.tensors))


def read_layer(path: Path) -> LayerStats:
    """What `write_layer` wrote.

    Raises:
        CheckpointError: unreadable.
    """
    try:
        return LayerStats(**read_tables(path))
    except TypeError as e:
        raise CheckpointError(f"{path.name} is damaged: {e}") from e


def read_tables(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        CheckpointError: unreadable.
    """
    from safetensors.torch import load

    try:
        found: dict[str, Tensor] = load(path.read_bytes())
    except Exception as e:  # safetensors raises its own
        raise CheckpointError(f"cannot read {path.name}: {e}") from e
    return found


def finish(partial: Path, folder: Path, keep: set[str]) -> None:
    """A folder that was filled beside its place comes to it, without what is not in `keep`."""
    with os_errors(f"write {folder}"):
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        for path in folder.iterdir():
            if path.name not in keep:
                path.unlink()
        sync_folder(folder.parent)


def _encoded(tables: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    found: bytes = save({name: t.contiguous() for name, t in sorted(tables.items())})
    return found


def _check_shapes(layers: Mapping[int, LayerStats], record: Record, name: str) -> None:
    """Domains and halves of every table as the record says."""
    wanted: tuple[Any, ...] = (len(record.tokens), len(record.domains))
    wrong = [i for i, s in layers.items() if s.sums_HCME.shape[:2] != wanted]
    if wrong or not layers or any(len(row) != wanted[1] for row in record.tokens):
        raise CheckpointError(f"{name}: {TABLES} and {RECORD} do not belong together")
