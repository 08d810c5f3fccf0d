"""Layers with adapters for `backward_matrix.py`, and their gradients by the reference and Triton.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from interpreter_matrix import Case, Layer, build, cases
from torch import Tensor

from moe_compose.kernels import ExpertLora, backward, reference
from moe_compose.kernels.backward_configs import BackwardConfig
from moe_compose.kernels.configs import Config, Tile
from moe_compose.kernels.gradients import LORA, WEIGHTS, Call
from moe_compose.kernels.layout import ExpertWeights


def tile(n: int, k: int) -> Tile:
    return Tile(n=n, k=k, warps=4, stages=1)


#: Several tiles in every direction, the last of them partly full; rows other than the forward's.
SMALL = BackwardConfig(
    rows=32, hidden=tile(16, 16), input=tile(32, 16), weight=tile(16, 16), weight_rows=32, group=3
)
#: Fewer, larger programs.
MEDIUM = BackwardConfig(
    rows=16, hidden=tile(32, 32), input=tile(64, 64), weight=tile(64, 16), weight_rows=32, group=2
)
LARGE = BackwardConfig(
    rows=32, hidden=tile(64, 64), input=tile(64, 64), weight=tile(64, 32), weight_rows=64, group=2
)
FORWARD = Config(rows=32, first=tile(64, 64), second=tile(64, 64), group=2)


def backward_cases() -> dict[str, Case]:
    """Those of the forward; most in large tiles, since the interpreter's time is per program."""
    every = cases()
    del every["many tiles of pairs"]
    small = {"strided", "hot", "not gated relu2 transposed=True"}
    found = {}
    for name, case in every.items():
        *rows, experts, top_k = case.sizes
        most = 12 if name == "many experts" else 5
        case = replace(case, sizes=(*rows, min(experts, most), min(top_k, most)))
        found[name] = replace(case, config=FORWARD) if case.config and name not in small else case
    return found


@dataclass(frozen=True, kw_only=True)
class Given:
    """A layer with adapters, and the gradient of its output."""

    layer: Layer
    lora: ExpertLora
    dout: Tensor

    def named(self) -> dict[str, Tensor]:
        weights = {n: getattr(self.layer.weights, n) for n in WEIGHTS}
        adapters = {n: getattr(self.lora, n) for n in LORA}
        every = {"x": self.layer.x, "gates": self.layer.gates, **weights, **adapters}
        return {name: t for name, t in every.items() if t is not None}

    def with_leaves(
        self, wanted: frozenset[str], dtype: torch.dtype | None = None
    ) -> tuple[Given, dict[str, Tensor]]:
        """New tensors, of which the wanted ones require gradients; the gates stay fp32 or more."""
        kept = {torch.bfloat16: torch.float32}
        made = {
            name: t.detach().to((kept.get(dtype, dtype) if name == "gates" else dtype) or t.dtype)
            for name, t in self.named().items()
        }
        leaves = {n: t.requires_grad_() for n, t in made.items() if n in wanted}
        layer = self.layer._replace(
            x=made["x"],
            gates=made["gates"],
            weights=ExpertWeights(**{n: made.get(n) for n in WEIGHTS}),
        )
        lora = replace(self.lora, **{n: made.get(n) for n in LORA})
        return replace(self, layer=layer, lora=lora, dout=self.dout.to(dtype)), leaves


def give(case: Case, seed: int, ranks: tuple[int, int] = (0, 0), *, bf16: bool = False) -> Given:
    """Ranks of the first and of the second matrix's pair; 0: none."""
    layer = build(case, seed, bf16=bf16)
    _, model, width, experts, _ = case.sizes
    fused = width * (2 if case.layout.gated else 1)
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = scale * torch.randn(*shape, generator=generator)
        return drawn.bfloat16().float() if bf16 else drawn

    made = {}
    if first := ranks[0]:
        made["gate_up_a"] = draw(experts, first, model, scale=model**-0.5)
        made["gate_up_b"] = draw(experts, fused, first, scale=first**-0.5)
    if second := ranks[1]:
        made["down_a"] = draw(experts, second, width, scale=width**-0.5)
        made["down_b"] = draw(experts, model, second, scale=second**-0.5)
    return Given(layer=layer, lora=ExpertLora(**made, scale=0.7), dout=draw(*layer.x.shape))


def eager(given: Given, wanted: frozenset[str], dtype: torch.dtype) -> dict[str, Tensor]:
    ours, leaves = given.with_leaves(wanted, dtype)
    y_TD = reference.moe_forward(*ours.layer, lora=ours.lora)
    if y_TD.requires_grad:  # not, where no pair reaches an expert
        y_TD.backward(ours.dout)
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def triton(given: Given, wanted: frozenset[str], case: Case, **options: Any) -> dict[str, Tensor]:
    ours, leaves = given.with_leaves(wanted, torch.float32)
    tiles = {None: None, 3: SMALL, 2: MEDIUM}[case.config and case.config.group]
    tiles = LARGE if case.config == FORWARD else tiles
    call = Call(layout=ours.layer.layout, config=case.config, backward_config=tiles, **options)
    x, weights, _, experts, gates = ours.layer
    y_TD = backward.moe_forward(x, weights, experts, gates, call, ours.lora)
    y_TD.backward(ours.dout)
    return {name: t.grad for name, t in leaves.items()}
