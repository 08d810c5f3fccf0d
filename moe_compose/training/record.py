"""What is written down of a training: which run a state belongs to, and how it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.recovery.texts import files_of
from moe_compose.training.batches import Texts
from moe_compose.training.options import TrainOptions


def job_of(
    source: TensorSource, texts: Texts, options: TrainOptions, teacher: TensorSource | None
) -> dict[str, Any]:
    """What a state belongs to."""
    free = ("save_every", "device", "shard")
    return {
        "source": source.digest(),
        "teacher": None if teacher is None else teacher.digest(),
        "text": texts.tokens.digest(),
        "held out": texts.held.digest(),
        **{n: v for n, v in asdict(options).items() if n not in free},
    }


def flags_of(
    texts: Texts, options: TrainOptions, teacher: TensorSource | None
) -> Mapping[str, Any]:
    """What says how, as the command line takes it: what is not as always, and the texts."""
    usual, o = asdict(TrainOptions()), asdict(options)
    chosen = {n: v for n, v in o.items() if v != usual[n] and n not in ("device", "save_every")}
    files = files_of(texts.tokens)
    named = {"domain" if "=" in files[0] else "data": files} if files else {}
    other = {"eval_data": files_of(texts.held)} if texts.held is not texts.tokens else {}
    beside = {"teacher": teacher.label} if teacher is not None else {}
    return {"objective": o["objective"], "steps": o["steps"], **chosen} | beside | named | other


def tokens_in(texts: Texts) -> dict[str, int]:
    """Distinct tokens that are trained on, and held-out ones."""
    return {
        "distinct": sum(len(texts.tokens.sequences[i].ids) for i in texts.fitted),
        "held_out": sum(len(texts.held.sequences[i].ids) for i in texts.chosen),
    }
