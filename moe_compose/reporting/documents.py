"""The small JSON files beside a checkpoint: `moe_compose.json` (what was done to it, operation by
operation) and `validation.json` (what was measured last).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.surgery.history import read_history, read_json
from moe_compose.surgery.plan import Plan

VALIDATION_NAME = "validation.json"
CARD_NAME = "README.md"


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
        return read_history(source)
    found: list[dict[str, Any]] = []
    for earlier in source.sources.values():
        found += [record for record in history_of(earlier) if record not in found]
    return [*found, plain(source.record())]


def read_validation(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The `validation.json` beside a checkpoint; None where there is none.

    Raises:
        CheckpointError: unreadable, or no object.
    """
    path = checkpoint.document(VALIDATION_NAME)
    if path is None:
        return None
    content = read_json(path, checkpoint.label)
    if not isinstance(content, dict):
        raise CheckpointError(f"{checkpoint.label}/{VALIDATION_NAME} must be one JSON object")
    return content
