"""What a checkpoint's history says about its tensors: which were made constant on purpose and still
are, and which dense family it was grown from.

The history is that of `moe_compose.json`, or of a plan that was never written. A checkpoint that
was trained and saved by others has none, so nothing of it is taken for constant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.history import read_history
from moe_compose.surgery.plan import Plan


def constants_of(source: TensorSource) -> frozenset[str]:
    """Patterns (`*` for every number) of tensors that an operation made constant, and that every
    later one copied.

    Raises:
        CheckpointError: the history cannot be read.
    """
    if isinstance(source, Plan):
        kept: frozenset[str] = frozenset()
        for earlier in source.sources.values():
            kept |= constants_of(earlier)
        return kept.intersection(source.copied()) | frozenset(source.constants())
    found: frozenset[str] = frozenset()
    for record in read_history(source):
        found = found.intersection(_texts(record, "copied")) | _texts(record, "constants")
    return found


def is_constant(name: str, constants: Collection[str]) -> bool:
    """Whether the tensor is among those of `constants_of`."""
    return re.sub(r"\d+", "*", name) in constants


def dense_ancestor(source: TensorSource, families: Collection[str]) -> str | None:
    """The one of these families that the history starts from; None where it does not say.

    Raises:
        CheckpointError: the history cannot be read.
    """
    if isinstance(source, Plan):
        for earlier in source.sources.values():
            family = str(earlier.config.get("model_type"))
            found = family if family in families else dense_ancestor(earlier, families)
            if found is not None:
                return found
        return None
    for record in read_history(source):
        sources = record.get("sources")
        for entry in sources if isinstance(sources, list) else []:
            stated = entry.get("model_type") if isinstance(entry, Mapping) else None
            if isinstance(stated, str) and stated in families:
                return stated
    return None


def _texts(record: Mapping[str, Any], entry: str) -> frozenset[str]:
    """A list of texts in a record, which anybody may have written."""
    found = record.get(entry)
    texts = found if isinstance(found, list) else []
    return frozenset(x for x in texts if isinstance(x, str))
