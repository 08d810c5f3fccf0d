"""Trainings of few steps of few tokens."""

from __future__ import annotations

from typing import Any

from moe_compose.training import TrainOptions


def few_steps(**changes: Any) -> TrainOptions:
    """Options."""
    few = {"steps": 6, "batch_tokens": 200, "eval_every": 2, "eval_tokens": 200, "save_every": 2}
    return TrainOptions(**{**few, "device": "cpu", **changes})
