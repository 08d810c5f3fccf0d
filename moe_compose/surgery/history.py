"""`moe_compose.json`: what was done to a checkpoint, one record per operation, oldest first.

Anybody may have written it, so it is read with care: bounded in size, and never trusted further
than that it is a list of objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError

HISTORY_NAME = "moe_compose.json"

#: Of a checkpoint: files of ours that no engine shall take for its own.
EXTRA_FOLDER = "moe_compose"

#: A document larger than this is not one of ours.
MAX_BYTES = 16 << 20


def read_history(source: TensorSource) -> list[dict[str, Any]]:
    """The records beside a source, oldest first; empty where there is no `moe_compose.json`.

    Raises:
        CheckpointError: unreadable, or no list of records.
    """
    path = document(source, HISTORY_NAME)
    if path is None:
        return []
    content = read_json(path, source.label)
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise CheckpointError(
            f"{source.label}/{HISTORY_NAME} must be a list of records",
            hint="Repair or remove the file.",
        )
    return content


def constants_beside(source: TensorSource) -> frozenset[str]:
    """Tensors that are one number throughout on purpose: an operation made them so, and every later
    one says so too, or that it copied them. Names, with `*` for every number where all are meant.

    Raises:
        CheckpointError: the history cannot be read.
    """
    found: frozenset[str] = frozenset()
    for record in read_history(source):
        found = found.intersection(_texts(record, "copied")) | _texts(record, "constants")
    return found


def _texts(record: Mapping[str, Any], entry: str) -> frozenset[str]:
    """A list of texts in a record, which anybody may have written."""
    found = record.get(entry)
    texts = found if isinstance(found, list) else []
    return frozenset(x for x in texts if isinstance(x, str))


def name_pattern(name: str) -> str:
    """A tensor's name with `*` for every number."""
    return re.sub(r"\d+", "*", name)


def is_constant(name: str, constants: Collection[str]) -> bool:
    """Whether a tensor is among those of `constants_beside`, or of `Plan.constants`."""
    return name in constants or name_pattern(name) in constants


def document(source: TensorSource, name: str) -> Path | None:
    """A file of ours that lies beside a source's weights; None where there is none.

    A checkpoint of which only headers were fetched has it too: it is small, and fetched now.

    Raises:
        CheckpointError: the Hub is out of reach.
    """
    path = source.files.get(name)
    return path or (source.document(name) if isinstance(source, Checkpoint) else None)


def read_json(path: Path, label: str) -> Any:
    """A small JSON file of a checkpoint.

    Args:
        path: the file.
        label: of its checkpoint, for errors.

    Raises:
        CheckpointError: missing, larger than `MAX_BYTES`, or no JSON.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {label}/{path.name} ({error})", hint="Repair or remove the file."
        ) from error
