"""Writing a checkpoint: any tensor source becomes a folder that any reader of the format opens.

Nothing is assembled in memory first. The layout of all files follows from names, dtypes and shapes;
what is unchanged is moved from file to file by the kernel, what is new is computed one tensor at a
time. Unlike `save_pretrained` this never builds a model, so no name, no dtype and no key of the
config is reinterpreted on the way.

The order on the disk is what makes a write safe to interrupt anywhere, even by pulling the plug:

1. a state file says what is being written and from what, and keeps other writers out;
2. `config.json`, the files that travel along, and those made for the result;
3. the shards, each under a temporary name until all of it is on the disk;
4. the index, without which a sharded folder is no checkpoint;
5. the state file goes.

Example:
    >>> write(Checkpoint.open("Qwen3-0.6B"), "resharded", shard_size=500_000_000)  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_compose.checkpoint.copying import os_errors, sync_folder, write_file
from moe_compose.checkpoint.destination import Destination
from moe_compose.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from moe_compose.checkpoint.pipeline import Pipeline
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.sharding import SHARD_SIZE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.checkpoint.survey import survey
from moe_compose.checkpoint.write_state import StateFile, refuse_if_locked
from moe_compose.errors import OptionError

log = logging.getLogger("moe_compose")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a write is.

    Attributes:
        bytes_done: bytes of tensors that are in their place, those of an earlier, resumed write
            included.
        bytes_total: bytes of all tensors.
        shard: the file that is being filled.
    """

    bytes_done: int
    bytes_total: int
    shard: str


def check_destination(
    source: TensorSource,
    folder: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
) -> Destination:
    """Refuse everything that `write` would refuse, without writing a byte; says what it would do.

    Args:
        source: what is to be written.
        folder: where.
        shard_size: as for `write`.
        resume: as for `write`.
        overwrite: as for `write`.

    Returns:
        The shards, those that are complete already, and the files that would be removed.

    Raises:
        OptionError: options that exclude each other, or make no sense.
        PlanError: the source contradicts itself: sizes, names of files carried along.
        CheckpointError: a file that would be copied is missing.
        WriteError: the folder is taken, not writable, too small, a source of the plan, or being
            written to.
    """
    folder = Path(folder).expanduser()
    refuse_if_locked(folder)
    return survey(source, folder, shard_size=shard_size, resume=resume, overwrite=overwrite)


def write(
    source: TensorSource,
    folder: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    documents: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Write a tensor source into a folder as a checkpoint.

    The bytes depend on the source and on `shard_size`, and on nothing else: not on `workers`, not
    on interruptions.

    Args:
        source: a `Plan`, a `Checkpoint`, or anything like them that allows several threads to read
            at once.
        folder: a new or empty folder, unless `resume` or `overwrite`; created with those above it.
        shard_size: bytes of tensors in one file at most; a larger tensor gets a file of its own.
        workers: threads; each holds at most one computed tensor. Default: one per CPU core, 4 at
            most.
        resume: continue what an interrupted write of the same source left there; shards that are
            complete stay.
        overwrite: replace the checkpoint, or the unfinished write, that is there. Other files stay.
        progress: called from this thread, about ten times a second.
        documents: small files made for this checkpoint, such as its card: name → content.

    Returns:
        The checkpoint that was written, opened.

    Raises:
        OptionError: options that exclude each other, or make no sense.
        PlanError: the source gives other bytes than it declares.
        CheckpointError: a file of the source is missing or cut short.
        WriteError: the folder is refused, or writing to it failed. What is finished stays, for
            `resume`.
    """
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise OptionError(f"a write needs at least one worker ({workers})")
    options = {"resume": resume, "overwrite": overwrite}
    folder = Path(folder).expanduser()
    if not check_destination(source, folder, shard_size=shard_size, **options).finished:
        _create(folder)
        with StateFile(folder) as state:
            try:
                # Once more, now that nobody else can change what is there.
                destination = survey(source, folder, shard_size=shard_size, **options)
            except BaseException:
                state.discard_if_empty()
                raise
            _write_small(destination, source, state, documents or {})
            _write_weights(destination, source, state, workers, progress)
    return Checkpoint.open(folder)


def _write_small(
    destination: Destination,
    source: TensorSource,
    state: StateFile,
    documents: Mapping[str, bytes],
) -> None:
    """Everything that comes before the weights, in the order that the module's docstring gives."""
    folder = destination.folder
    if destination.removed:
        state.record(replace(destination.state, removing=True))
        _remove(destination)
    state.record(destination.state)
    write_file(folder / CONFIG_NAME, destination.config)
    for name, path in source.files.items():
        write_file(folder / name, path)
    for name, content in documents.items():
        write_file(folder / name, content)


def _write_weights(
    destination: Destination,
    source: TensorSource,
    state: StateFile,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """The shards that are not there yet, and the index."""
    folder = destination.folder

    def report(done: int, shard: str) -> None:
        if progress is not None:
            progress(Progress(done, destination.bytes_total, shard))

    remaining = [shard for shard in destination.shards if shard.name not in destination.kept]
    log.info("%s: %d shards to write, %d kept", folder, len(remaining), len(destination.kept))
    Pipeline(
        source,
        folder,
        remaining,
        workers=workers,
        done=destination.bytes_kept,
        report=report,
    ).run()
    if destination.index is not None:
        write_file(folder / INDEX_NAME, destination.index)
    state.remove()


def _create(folder: Path) -> None:
    with os_errors(f"create {folder}/"):
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.absolute().parent)


def _remove(destination: Destination) -> None:
    for name in destination.removed:
        path = destination.folder / name
        with os_errors(f"remove {path}"):
            path.unlink(missing_ok=True)
    with os_errors(f"remove files from {destination.folder}/"):
        sync_folder(destination.folder)
