"""Text in rounds: every round is a pass of its own, and a finished one is kept on disk, so that an
interrupted evaluation goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import WriteError
from moe_compose.evaluation.options import EvaluateOptions

#: Tokens of a round.
ROUND = 16_384


def rounds_of(tokens: TokenSet) -> Iterator[TokenSet]:
    """The sequences in order, about `ROUND` tokens at a time."""
    begin = held = 0
    for end, sequence in enumerate(tokens.sequences, 1):
        held += len(sequence.ids)
        if held >= ROUND or end == len(tokens.sequences):
            yield replace(tokens, sequences=tokens.sequences[begin:end])
            begin, held = end, 0


def key_of(
    source: TensorSource, against: TensorSource | None, tokens: TokenSet, options: EvaluateOptions
) -> str:
    """What a kept round belongs to: both models, the text, and how it is run."""
    parts: list[Any] = [tokens.digest(), asdict(options)]
    for one in (source, against):
        if one is not None:
            stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in one.weight_files]
            parts.append([one.digest(), stats])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Kept:
    """Finished rounds in a file.

    Args:
        path: None: nothing is kept.
        key: what they belong to.
        resume: whether rounds that are there are taken.

    Raises:
        WriteError: there are rounds of something else, or rounds that were not to be taken.
    """

    def __init__(self, path: Path | None, key: str, *, resume: bool) -> None:
        self.path, self.key = path, key
        self.rounds: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        if not resume:
            raise WriteError(
                f"{path.name} holds finished rounds of an evaluation",
                hint="Continue with --resume, or remove it.",
            )
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            known, rounds = saved["key"], list(saved["rounds"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise WriteError(f"{path.name} is damaged: {e}", hint="Remove it.") from e
        if known != key:
            raise WriteError(
                f"{path.name} belongs to other models, other text or other options",
                hint="Remove it to start again.",
            )
        self.rounds = rounds

    def add(self, sums: dict[str, Any]) -> None:
        """Keep one more round; the file is whole at any time."""
        self.rounds.append(sums)
        if self.path is None:
            return
        new = self.path.with_name(self.path.name + ".new")
        try:
            new.write_text(json.dumps({"key": self.key, "rounds": self.rounds}), encoding="utf-8")
            os.replace(new, self.path)
        except OSError as e:
            raise WriteError(f"cannot write {self.path.name}: {e.strerror}") from e

    def done(self) -> None:
        """Remove the file: the result has it all."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
