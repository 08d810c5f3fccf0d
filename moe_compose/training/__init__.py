"""Training what an MoE has of its own: routers, alone or with experts, on one device or several.

options.py      what can be asked for
parts.py        `--train` as the parts of a model that train
chosen.py       those parts as tensors, and rows of them, in memory
balance.py      load-balancing losses and the correction bias's update
routers.py      router logits and dispatch of a forward pass
objectives.py   what is minimised: lm, distill, domain
labels.py       which expert belongs to a text's domain
adapters.py     LoRA on attention, experts or both, through peft
masters.py      fp32 copies that the optimizer moves; hashes of all else
engine.py       one process, or several of torchrun through accelerate
batches.py      which sequences a step sees: a function of seed and step alone
measure.py      held-out loss, and how tokens are spread
state.py        what a run leaves behind for the next one
journal.py      training.jsonl and TensorBoard
loop.py         the steps
record.py       which run a state belongs to, and how it was asked for
train.py        `train_router`: all of it together
layerwise.py    the objective `layer`: streamed, layer after layer
one_layer.py    the steps of one of them
ffn.py          the FFN of each layer of a streamed model
freezing.py     `freeze`: the stages of Branch-Adapt-Route in anybody's training loop
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compose.training.freezing import Freeze, freeze
    from moe_compose.training.options import TrainOptions
    from moe_compose.training.train import train_router

_HOME = {
    "TrainOptions": "options",
    "train_router": "train",
    "freeze": "freezing",
    "Freeze": "freezing",
}

__all__ = ["Freeze", "TrainOptions", "freeze", "train_router"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
