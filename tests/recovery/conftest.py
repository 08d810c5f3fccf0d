"""Tiny MoEs, tokens, and a refit with few of them."""

from __future__ import annotations

import random

import pytest

from moe_compose.calibration.tokens import TokenSet
from moe_compose.recovery.options import RefitOptions


def ids(lengths: list[int], seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 96) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Two domains, sequences of several lengths, so that batches are padded."""
    return TokenSet.of_ids({"a": ids([40, 33, 40, 28] * 4, 0), "b": ids([31, 40] * 6, 1)})


@pytest.fixture(scope="session")
def options() -> RefitOptions:
    return RefitOptions(batch=6, held_out=4)
