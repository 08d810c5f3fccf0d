"""What lies around the tensors of two checkpoints, compared: `config.json`, and the files that
travel along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.reporting.difference import EntryChange, Status
from moe_compose.reporting.documents import CARD_NAME
from moe_compose.surgery.history import HISTORY_NAME


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[EntryChange]:
    """Entries that are not the same, by name. `1`, `1.0` and `true` are three values."""
    a, b = dict(_flat(before)), dict(_flat(after))
    for name in sorted(a.keys() | b.keys()):
        if name not in b:
            yield EntryChange(name, "removed", a[name], None)
        elif name not in a:
            yield EntryChange(name, "added", None, b[name])
        elif a[name] != b[name] or type(a[name]) is not type(b[name]):
            yield EntryChange(name, "changed", a[name], b[name])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries by dotted names; empty objects and lists stay as they are."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def file_changes(before: TensorSource, after: TensorSource) -> tuple[dict[str, Status], int]:
    """Name → status of the files that differ, and how many do not."""
    documents = {HISTORY_NAME, CARD_NAME}
    found: dict[str, Status] = {}
    names = (before.files.keys() | after.files.keys()) - documents
    for name in sorted(names):
        a, b = before.files.get(name), after.files.get(name)
        if a is None or b is None:
            found[name] = "added" if b else "removed"
        elif a != b and _sha256(a) != _sha256(b):
            found[name] = "changed"
    return found, len(names) - len(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
