"""The small JSON files beside a checkpoint: `moe_compose.json` (what was done to it, operation by
operation) and `validation.json` (what was measured last).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.surgery.plan import Plan

HISTORY_NAME = "moe_compose.json"
VALIDATION_NAME = "validation.json"
CARD_NAME = "README.md"

#: A document larger than this is not one of ours.
MAX_BYTES = 16 << 20


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become null, the rest stays."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def encode(value: Any) -> bytes:
    """JSON text as files hold it: two spaces, any script unescaped, a newline at the end."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def history_of(source: TensorSource) -> list[dict[str, Any]]:
    """What was done to a source, oldest first; empty for a checkpoint that nobody operated on.

    Of a plan: the histories of its sources, each record once, and the plan's own record.

    Raises:
        CheckpointError: there is a `moe_compose.json` that is no list of records.
    """
    if not isinstance(source, Plan):
        path = source.files.get(HISTORY_NAME)
        return [] if path is None else read_history(path, source.label)
    found: list[dict[str, Any]] = []
    for earlier in source.sources.values():
        found += [record for record in history_of(earlier) if record not in found]
    return [*found, plain(source.record())]


def read_history(path: Path, label: str) -> list[dict[str, Any]]:
    """The records of a `moe_compose.json`.

    Args:
        path: the file.
        label: of its checkpoint, for errors.

    Raises:
        CheckpointError: unreadable, or no list of records.
    """
    content = _read(path, label)
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise CheckpointError(
            f"{label}/{path.name} must be a list of records", hint="Repair or remove the file."
        )
    return content


def read_validation(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The `validation.json` beside a checkpoint; None where there is none.

    Raises:
        CheckpointError: unreadable, or no object.
    """
    path = checkpoint.path / VALIDATION_NAME if checkpoint.path else None
    if path is None or not path.is_file():
        return None
    content = _read(path, checkpoint.label)
    if not isinstance(content, dict):
        raise CheckpointError(f"{checkpoint.label}/{VALIDATION_NAME} must be one JSON object")
    return content


def _read(path: Path, label: str) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {label}/{path.name} ({error})", hint="Repair or remove the file."
        ) from error
