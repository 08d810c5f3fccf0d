"""Tiny MoEs, tokens, and trainings of few steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet


def ids(lengths: list[int], seed: int) -> list[list[int]]:
    """Sequences in which a token says much about the next one."""
    draw, rows = random.Random(seed), []
    for n in lengths:
        row = [draw.randrange(3, 96)]
        while len(row) < n:
            row.append((row[-1] * 5 + seed) % 93 + 3 if draw.random() < 0.8 else draw.randrange(96))
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Two domains, sequences of several lengths, so that batches are padded."""
    return TokenSet.of_ids({"a": ids([40, 33, 40, 28] * 5, 1), "b": ids([31, 40] * 10, 2)})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., mc.Checkpoint]:
    """A function that gives a family's tiny checkpoint."""
    made: dict[str, Path] = {}

    def tiny(family: str, **how: Any) -> mc.Checkpoint:
        key = f"{family} {sorted(how.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / family
            tiny_checkpoint(family, made[key], **how)
        return mc.Checkpoint.open(made[key])

    return tiny
