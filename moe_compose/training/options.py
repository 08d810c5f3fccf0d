"""What can be asked of `train_router`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from moe_compose.errors import OptionError
from moe_compose.training.parts import Parts

Objective = Literal["lm", "distill", "domain", "layer"]
Balance = Literal["switch", "bias", "none"]
Dtype = Literal["float32", "bfloat16", "float64"]

#: Lowest values of what is counted.
_LEAST = {
    **dict.fromkeys(("steps", "batch", "eval_every", "save_every", "lora_rank", "lora_alpha"), 1),
    **dict.fromkeys(("batch_tokens", "seq_len", "eval_tokens", "layer_tokens"), 2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of `train_router`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        objective: What is minimised: lm (next token), distill (KL to --teacher), domain
            (cross-entropy of the router to the expert of the text's domain), or layer (distance
            of each layer's output to that of --teacher, one layer of both in memory; routers only).
        train: What trains: router, router+experts=3,5 (these experts too), lora-attention,
            lora-experts or lora-all (routers, and adapters on attention, on all experts, or on
            both), or all.
        lora_rank: Rank of adapters.
        lora_alpha: Adapters are multiplied by lora_alpha / lora_rank.
        steps: Steps of the optimizer; of each layer with the objective layer.
        lr: Learning rate of AdamW, constant; some 1e-2 for the objective layer.
        weight_decay: Weight decay of AdamW.
        clip: Largest norm of the gradient.
        batch_tokens: Tokens of a step, over all processes.
        seq_len: Longest sequence, in tokens.
        batch: Sequences that run together, over all processes.
        balance: Against collapse: switch (a loss per layer), bias (moves the correction bias of
            families that have one), or none; by default switch where the source was upcycled, else
            none.
        balance_coef: Coefficient of the switch loss.
        bias_rate: What the correction bias moves by in a step.
        z_loss: Coefficient of mean(logsumexp(z)²) of the router's logits; not for layer.
        layer_tokens: Tokens that the objective layer trains on, again and again; three hidden
            states of each are kept in memory.
        eval_every: Steps between two evaluations on held-out text; the best one is kept.
        eval_tokens: Tokens of held-out text; without text of its own they are split off.
        patience: Stop after so many evaluations without a gain; by default never.
        save_every: Steps between two states that --resume can continue from.
        checkpointing: Recompute activations in the backward pass, which takes less memory and more
            time.
        shard: Several processes hold a part of the model each (FSDP2) in place of a copy.
        seed: Seed of the draw and of the order of sequences.
        device: Where to compute: cpu, cuda, cuda:1; by default cuda if there is one.
        dtype: What frozen weights compute in: float32, bfloat16 or float64; by default float32 on
            the CPU and the checkpoint's own elsewhere. What trains is kept in float32.
    """

    objective: Objective = "lm"
    train: str = "router"
    lora_rank: int = 8
    lora_alpha: int = 16
    steps: int = 300
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_tokens: int = 4096
    seq_len: int = 512
    batch: int = 8
    balance: Balance | None = None
    balance_coef: float = 0.01
    bias_rate: float = 1e-3
    z_loss: float = 1e-3
    layer_tokens: int = 131_072
    eval_every: int = 25
    eval_tokens: int = 16_384
    patience: int | None = None
    save_every: int = 25
    checkpointing: bool = False
    shard: bool = False
    seed: int = 0
    device: str | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise OptionError("this training cannot be meant", problems=problems)

    @property
    def parts(self) -> Parts:
        """What trains."""
        return Parts.parse(self.train)

    def _problems(self) -> Iterator[str]:
        for name, kind in (("objective", Objective), ("balance", Balance), ("dtype", Dtype)):
            value = getattr(self, name)
            if value not in get_args(kind) and (value is not None or name == "objective"):
                yield f"{name} ({value}) must be one of {', '.join(get_args(kind))}"
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                yield f"{name} ({getattr(self, name)}) must be at least {least}"
        if self.patience is not None and self.patience < 1:
            yield f"patience ({self.patience}) must be at least 1"
        for name in ("lr", "clip", "bias_rate"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"{name} ({getattr(self, name)}) must be above 0"
        for name in ("weight_decay", "balance_coef", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"{name} ({getattr(self, name)}) must be 0 or above"
        try:
            Parts.parse(self.train)
        except OptionError as e:
            yield e.message
