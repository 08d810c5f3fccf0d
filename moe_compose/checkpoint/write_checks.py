"""What must hold before a write may begin: nothing here changes a byte.

The rule behind most of it: a write never touches what it reads from. Sources are told apart by
their identity on the disk, not by how their paths are spelled, so symbolic links, bind mounts and
file systems that ignore case lead to the same answer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from moe_compose.checkpoint.copying import PART_SUFFIX
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, PlanError, WriteError

#: Bytes asked for beyond the files themselves: names, block maps, the last incomplete blocks.
SPACE_MARGIN = 4 << 20

#: Units of sizes as people type them: decimal, as shard sizes are everywhere.
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def source_paths(source: TensorSource) -> tuple[Path, ...]:
    """Every file that bytes will be copied from, in order of first use, then those only read.

    Raises:
        PlanError: a tensor's bytes on the disk are not as many as it declares.
    """
    paths: dict[Path, None] = {}
    problems = []
    for name, info in source.tensors.items():
        extents = source.extents(name)
        if extents is None:
            continue
        found = sum(extent.nbytes for extent in extents)
        if found != info.nbytes:
            problems.append(f"{name}: declares {info.nbytes} bytes, is copied from {found}")
        paths.update((extent.path, None) for extent in extents)
    if problems:
        raise PlanError("every tensor must be as large as it declares", problems=problems)
    paths.update((path, None) for path in source.weight_files)
    return tuple(paths)


def fingerprint(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of last change of files: what tells a resumed write that they are still
    the same.

    Raises:
        CheckpointError: a file is missing or cannot be looked at.
    """
    found = []
    for path in paths:
        stat = _stat_source(path)
        found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def check_path(folder: Path) -> Path:
    """Refuse an output path that cannot become a folder of ours.

    Returns:
        The folder itself, or the nearest one above it that exists.

    Raises:
        WriteError: it is a symbolic link or a file, lies under a file, or cannot be written to.
    """
    if folder.is_symlink():
        target = os.readlink(folder)
        dangling = "" if folder.exists() else ", which does not exist"
        raise WriteError(
            f"the output folder must not be a symbolic link ({folder} leads to {target}{dangling})",
            hint="Give the folder itself.",
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise WriteError(f"the output folder must be a folder ({existing} is a file)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise WriteError(
            f"the output folder must be writable ({existing} is not)",
            hint="Give another folder, or change its permissions.",
        )
    return existing


def check_overlap(source: TensorSource, paths: Iterable[Path], folder: Path) -> None:
    """Refuse an output folder that is a source, lies inside one, or has one inside.

    Raises:
        WriteError: so it is.
    """
    output = _lineage(folder)
    for place in _source_folders(source, paths):
        lineage = _lineage(place)
        if output[0] == lineage[0]:
            relation = "is"
        elif lineage[0] in output:
            relation = "lies inside"
        elif output[0] is not None and output[0] in lineage:
            relation = "contains"
        else:
            continue
        raise WriteError(
            f"the output must not touch its sources ({folder}/ {relation} the folder {place})",
            hint="Give a folder elsewhere.",
        )


def _source_folders(source: TensorSource, paths: Iterable[Path]) -> Iterator[Path]:
    """The folders that bytes come from, with links (as in the Hub's cache) both followed and
    not.
    """
    places: dict[Path, None] = {}
    for path in paths:
        places.update({path.parent: None, Path(os.path.realpath(path)).parent: None})
    for name, path in source.files.items():
        root = path.parents[len(PurePosixPath(name).parts) - 1]
        if (root / "config.json").exists():
            places[root] = None
    return iter(places)


def _lineage(path: Path) -> list[tuple[int, int] | None]:
    """Identities of a folder and of all folders above it; None for those that do not exist yet."""
    real = Path(os.path.realpath(path))
    found: list[tuple[int, int] | None] = []
    for folder in (real, *real.parents):
        found.append(None)
        with suppress(FileNotFoundError):
            stat = folder.stat()
            found[-1] = (stat.st_dev, stat.st_ino)
    return found


def check_carried(source: TensorSource, folder: Path, taken: Iterable[str]) -> int:
    """Check the files that travel along.

    Args:
        source: its `files` are checked.
        folder: where they will be written.
        taken: names that the write itself needs.

    Returns:
        Their bytes in total.

    Raises:
        PlanError: a name is taken, absolute, or leads out of the folder.
        CheckpointError: a file is missing.
        WriteError: a link in the output folder would lead a file out of it.
    """
    reserved = {name for base in taken for name in (base, base + PART_SUFFIX)}
    problems, size = [], 0
    for name, path in source.files.items():
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
            problems.append(f"{name!r} does not name a file inside the folder")
        elif str(pure) in reserved:
            problems.append(f"{name!r} is a file that the write itself makes")
        size += _stat_source(path).st_size
    if problems:
        raise PlanError("files carried along need names of their own", problems=problems)
    root = Path(os.path.realpath(folder))
    for name in source.files:
        parent = Path(os.path.realpath((folder / name).parent))
        if not parent.is_relative_to(root):
            raise WriteError(f"{folder / name} would be written outside of {folder}/ ({parent})")
    return size


def check_space(existing: Path, folder: Path, needed: int, freed: int) -> None:
    """Refuse a write that the disk has no room for.

    Args:
        existing: a folder on the disk in question.
        folder: the output, for the message.
        needed: bytes still to be written.
        freed: bytes of files that will be removed first.

    Raises:
        WriteError: there is not enough room.
    """
    needed += SPACE_MARGIN
    available = shutil.disk_usage(existing).free + freed
    if needed > available:
        raise WriteError(
            f"not enough space for {folder}/ (needs {human(needed)}, available {human(available)})",
            hint="Free some space, write to another disk, or choose a smaller --dtype.",
        )


def human(nbytes: int) -> str:
    """Bytes for people: `4.7 GiB`."""
    if nbytes < 1 << 20:
        return f"{nbytes / 1024:.1f} KiB"
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"


def parse_bytes(size: str | int) -> int:
    """`5GB`, `500MB` or a plain number of bytes; units are decimal, as shard sizes are everywhere.

    Raises:
        ValueError: it is no size; what it must be, in words.

    >>> parse_bytes("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(size).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if found < 1:
        raise ValueError("a size in bytes, such as 5GB, 500MB or 4000000")
    return found


def _stat_source(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from error
