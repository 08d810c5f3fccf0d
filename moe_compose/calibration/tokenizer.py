"""The tokenizer that came with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, UnsupportedError


def tokenizer_of(source: TensorSource) -> Any:
    """Load the tokenizer beside a checkpoint, or that a plan carries along.

    Code that comes with a checkpoint is never run.

    Raises:
        UnsupportedError: there is none.
        CheckpointError: it does not load.
    """
    path = source.files.get("tokenizer_config.json") or source.files.get("tokenizer.json")
    if path is None:
        raise UnsupportedError(
            f"{source.label} has no tokenizer, so text cannot be run through it",
            hint="Put tokenizer.json and tokenizer_config.json beside its weights.",
        )
    from moe_compose.runtime.pretrained import first_line, load_tokenizer

    try:
        return load_tokenizer(path.parent)
    except Exception as e:  # whatever a tokenizer raises, the finding is the same
        raise CheckpointError(
            f"the tokenizer of {source.label} does not load: {first_line(e)}"
        ) from e


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding; None where the config does not tell."""
    found = config.get("vocab_size")
    return found if isinstance(found, int) else None


def context_of(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that the model was made for, in tokens; None where the config does not
    tell.
    """
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None
