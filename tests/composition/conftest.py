"""A tiny MoE of four named experts, and token ids for each."""

from __future__ import annotations

import random

import pytest
from mutants import mutant
from pruned import lively_checkpoint

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.composition.options import RoutingOptions

NAMES = ["base", "py", "math", "de"]


def ids(lengths: list[int], seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    low = 3 + 20 * seed  # every text has tokens of its own
    return [[draw.randrange(low, low + 30) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="session")
def texts() -> dict[str, TokenSet]:
    """Sequences of several lengths, so that batches are padded; the base has no text."""
    lengths = [40, 33, 28, 40, 17, 36, 25, 31, 40]
    return {n: TokenSet.of_ids({n: ids(lengths, i)}) for i, n in enumerate(NAMES[1:])}


@pytest.fixture(scope="session")
def options() -> RoutingOptions:
    return RoutingOptions(batch=4, held_out=3)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    """Weights that sum to 1, every layer sparse, experts with names."""
    folder = tmp_path_factory.mktemp("composition")
    made = lively_checkpoint("mixtral", folder / "tiny", num_local_experts=4)
    return mutant(made, folder / "named", config=lambda c: c.update(expert_names=NAMES))
