"""Tiny checkpoints and token ids to measure them on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet

Tiny = Callable[..., mc.Checkpoint]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A function that gives a family's tiny checkpoint; correction biases are not zero."""
    made: dict[str, mc.Checkpoint] = {}

    def tiny(family: str, **changes: Any) -> mc.Checkpoint:
        key = f"{family} {changes}"
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / family
            model = tiny_model(family, **changes)
            generator = torch.Generator().manual_seed(1)
            for name, tensor in (*model.named_buffers(), *model.named_parameters()):
                if "correction_bias" in name:
                    tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor) / 4
            model.save_pretrained(folder)
            made[key] = mc.Checkpoint.open(folder)
        return made[key]

    return tiny


def ids(lengths: list[int], seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 96) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Two domains, sequences of many lengths."""
    return TokenSet.of_ids({"a": ids([13, 5, 9, 16], 0), "b": ids([4, 12, 9], 1)})


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and text, which are not part of this repository."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data: real small models, text, and oracle numbers")
    return folder
