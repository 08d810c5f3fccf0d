"""Fixtures: small checkpoints in a temporary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hand_made import Make, make_checkpoint

from moe_compose.checkpoint.reader import Checkpoint


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes a small checkpoint into a folder of this name."""

    def make(kind: str = "llama", name: str = "dense", **rest: Any) -> Checkpoint:
        return make_checkpoint(tmp_path / name, kind, **rest)

    return make
