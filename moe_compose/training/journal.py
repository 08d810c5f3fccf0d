"""What happens while a model trains: a line of JSON a step and an evaluation, and TensorBoard where
it is installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.copying import os_errors, write_file
from moe_compose.training.measure import Evaluated

JOURNAL = "training.jsonl"
BOARD = "tensorboard"


class Journal:
    """A run's journal.

    Args:
        folder: where it is kept; None: nowhere.
        after: lines of later steps, which an interrupted run left, are dropped.
    """

    def __init__(self, folder: Path | None, after: int) -> None:
        self._path = None if folder is None else folder / JOURNAL
        self._board: Any = None
        if folder is None or self._path is None:
            return
        lines = self._path.read_text().splitlines() if after and self._path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= after]
        write_file(self._path, "".join(f"{line}\n" for line in kept).encode())
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / BOARD), purge_step=after or None)

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """A step of the optimizer."""
        self._line({"step": step, **figures})
        self._draw(step, {f"train/{name}": value for name, value in figures.items()})

    def evaluated(self, found: Evaluated) -> None:
        """An evaluation."""
        self._line({"step": found.step, "held_out": found.to_json()})
        figures = {"held_out/loss": found.loss, "held_out/dead": float(found.dead)}
        figures |= {f"held_out/loss of {d}": loss for d, loss in found.domains.items()}
        for i, spread in found.layers.items():
            figures[f"entropy/layer {i}"] = spread.entropy
            figures[f"max violation/layer {i}"] = spread.max_violation
        self._draw(found.step, figures)

    def close(self) -> None:
        """Nothing more comes."""
        if self._board is not None:
            self._board.close()

    def _line(self, entry: Mapping[str, Any]) -> None:
        if self._path is not None:
            with os_errors(f"write {self._path}"), self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _draw(self, step: int, figures: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)


def _step_of(line: str) -> float:
    """The step that a line is about; a damaged one, cut off by a kill, is about none."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
