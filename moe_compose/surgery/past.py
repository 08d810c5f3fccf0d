"""What a checkpoint's history says about its tensors: which were made constant on purpose and still
are, and which dense family it was grown from.

The history is that of `moe_compose.json`, or of a plan that was never written. A checkpoint that
was trained and saved by others has none, so nothing of it is taken for constant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.history import constants_beside, read_history
from moe_compose.surgery.plan import Plan


def constants_of(source: TensorSource) -> frozenset[str]:
    """Names of tensors (`*` for numbers where all are meant) that an operation made constant, and
    that none has changed since.

    Raises:
        CheckpointError: the history cannot be read.
    """
    return frozenset(source.constants()) if isinstance(source, Plan) else constants_beside(source)


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
