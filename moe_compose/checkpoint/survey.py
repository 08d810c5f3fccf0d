"""Whether a checkpoint may be written into a folder, and what the write would do there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_compose.checkpoint.copying import PART_SUFFIX, os_errors
from moe_compose.checkpoint.destination import Destination
from moe_compose.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from moe_compose.checkpoint.found import EITHER_HINT, Found
from moe_compose.checkpoint.sharding import encode_index, encode_json, plan_shards
from moe_compose.checkpoint.source import TensorSource
from moe_compose.checkpoint.write_checks import (
    check_carried,
    check_overlap,
    check_path,
    check_space,
    fingerprint,
    source_paths,
)
from moe_compose.checkpoint.write_state import STATE_NAME, WriteState
from moe_compose.errors import OptionError


def survey(
    source: TensorSource, folder: Path, *, shard_size: int, resume: bool, overwrite: bool
) -> Destination:
    """Make every check that a write needs, and say what it would do; writes nothing.

    Raises:
        OptionError: options that cannot be meant.
        PlanError: the source contradicts itself.
        CheckpointError: a file of the source is missing.
        WriteError: the folder cannot, or must not, be written to.
    """
    if shard_size < 1:
        raise OptionError(f"a shard needs at least one byte (--shard-size {shard_size})")
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other", hint=EITHER_HINT)
    with os_errors(f"prepare {folder}/"):
        existing = check_path(folder)
        paths = source_paths(source)
        check_overlap(source, paths, folder)
        wanted = _lay_out(source, folder, shard_size, fingerprint(paths))
        taken = [CONFIG_NAME, INDEX_NAME, STATE_NAME, *(shard.name for shard in wanted.shards)]
        carried = check_carried(source, folder, taken)
        found = Found(wanted, frozenset(source.files))
        if overwrite:
            destination = replace(wanted, removed=found.overwritten())
        elif resume:
            destination = found.resumed()
        else:
            found.refuse_unless_empty()
            destination = wanted
        if not destination.finished:
            _check_space(destination, existing, carried)
    return destination


def _lay_out(
    source: TensorSource,
    folder: Path,
    shard_size: int,
    sources: tuple[tuple[str, int, int], ...],
) -> Destination:
    """The write as it is in an empty folder."""
    digest = source.digest()
    shards = plan_shards(source.tensors.values(), shard_size, digest)
    return Destination(
        folder=folder,
        shards=shards,
        kept=frozenset(),
        finished=False,
        removed=(),
        state=WriteState(digest, tuple((s.name, s.size) for s in shards), sources),
        config=encode_json(source.config),
        index=encode_index(shards, source.tensors) if len(shards) > 1 else None,
    )


def _check_space(destination: Destination, existing: Path, carried: int) -> None:
    gone = {*destination.removed}
    for shard in destination.shards:
        if shard.name not in destination.kept:
            gone |= {shard.name, shard.name + PART_SUFFIX}
    freed = sum(_bytes_freed(destination.folder / name) for name in gone)
    remaining = sum(s.size for s in destination.shards if s.name not in destination.kept)
    small = carried + len(destination.config) + len(destination.index or b"")
    check_space(existing, destination.folder, remaining + small, freed)


def _bytes_freed(path: Path) -> int:
    """Bytes that removing a file gives back: none if it is missing, or has another name too."""
    try:
        stat = path.lstat()
    except OSError:
        return 0
    return stat.st_blocks * 512 if stat.st_nlink == 1 else 0
