"""Runs the kernels in Triton's interpreter and writes every error as JSON; started by
`test_triton.py` in a process of its own, since triton is either the interpreter or the compiler.

    TRITON_INTERPRET=1 python interpreter_matrix.py out.json

Fresh memory is NaN here, so whatever reads what nobody wrote shows.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from tiny_models import tiny_model
from torch import Tensor

from moe_compose.kernels import hook, reference, triton_forward
from moe_compose.kernels.configs import Config, Tile
from moe_compose.kernels.layout import ACTIVATIONS, ExpertLayout, ExpertWeights
from moe_compose.kernels.saliency import Saliency

#: Small enough that odd sizes take several tiles in every direction, the last of them partly full.
SMALL = Config(
    rows=16,
    first=Tile(n=16, k=16, warps=4, stages=1),
    second=Tile(n=32, k=16, warps=4, stages=1),
    group=3,
)
#: Fewer, larger programs: the interpreter's time is per program.
MEDIUM = Config(
    rows=16,
    first=Tile(n=32, k=32, warps=4, stages=1),
    second=Tile(n=64, k=32, warps=4, stages=1),
    group=2,
)
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "deepseek_v3",
    "gpt_oss",
    "glm4_moe",
    "nemotron_h",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    layout: ExpertLayout = ExpertLayout()
    sizes: tuple[int, int, int, int, int] = (23, 45, 19, 5, 2)  # T, D, F, E, K
    routing: str = "random"
    bias: bool = False
    config: Config | None = MEDIUM
    strided: bool = False


class Layer(NamedTuple):
    """The arguments of `moe_forward`."""

    x: Tensor
    weights: ExpertWeights
    layout: ExpertLayout
    experts: Tensor
    gates: Tensor


def cases() -> dict[str, Case]:
    """Two activations in every layout, the others in one each; then what routing can do."""
    found = {}
    for i, (name, interleaved, transposed) in enumerate(
        itertools.product(ACTIVATIONS, (False, True), (False, True))
    ):
        if name not in ("silu", "clamped_swiglu") and i // 4 != 2 * interleaved + transposed + 1:
            continue
        limit = 0.7 if name in ("clamped_swiglu", "silu") and i % 2 == 0 else None
        layout = ExpertLayout(
            interleaved=interleaved, transposed=transposed, activation=name, limit=limit
        )
        experts = 1 + (5 * i) % 17
        top_k = 1 + i % min(experts, 4)
        sizes = (5 + i % 11, 33 + i, 17 + i, experts, top_k)
        config = (SMALL, MEDIUM, None)[i % 5 % 3]
        found[f"{name} {interleaved=} {transposed=}"] = Case(
            layout=layout, sizes=sizes, bias=i % 3 != 0, config=config
        )
    for name, transposed in itertools.product(("relu2", "silu"), (False, True)):
        layout = ExpertLayout(gated=False, transposed=transposed, activation=name)
        found[f"not gated {name} {transposed=}"] = Case(layout=layout, bias=transposed)
    for routing in ("hot", "empty", "dropped", "all dropped"):
        found[routing] = Case(routing=routing, sizes=(25, 40, 24, 9, 3), bias=True)
    return found | {
        "one token": Case(sizes=(1, 40, 24, 7, 3)),
        "one token, one expert": Case(sizes=(1, 16, 16, 1, 1)),
        "no token": Case(sizes=(0, 40, 24, 7, 3)),
        "all experts": Case(sizes=(8, 40, 24, 9, 9)),
        "even sizes": Case(sizes=(48, 64, 32, 4, 2)),
        "many tiles of pairs": Case(sizes=(100, 16, 16, 12, 4)),
        "many experts": Case(sizes=(9, 16, 16, 130, 4)),
        "strided": Case(strided=True, bias=True, config=SMALL),
        "tiles of the table": Case(sizes=(70, 130, 140, 6, 2), config=None, bias=True),
    }


def choose(case: Case, generator: torch.Generator) -> Tensor:
    tokens, _, _, experts, top_k = case.sizes
    scores = torch.rand(tokens, experts, generator=generator)
    if case.routing == "hot":
        scores[:, 4] = 2
    if case.routing == "empty":
        scores[:, ::2] = -1
    ids = scores.argsort(-1, descending=True)[:, :top_k]
    if case.routing == "dropped":
        ids[::3, 0], ids[1::4, 2] = experts, -1
        ids[5] = 1000
    if case.routing == "all dropped":
        ids[:] = experts
    return ids


def build(case: Case, seed: int, *, bf16: bool = False) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = scale * torch.randn(*shape, generator=generator)
        return drawn.bfloat16().float() if bf16 else drawn

    layout = case.layout
    tokens, model, width, experts, top_k = case.sizes
    fused = width * (2 if layout.gated else 1)
    first = draw(experts, fused, model, scale=model**-0.5)
    second = draw(experts, model, width, scale=width**-0.5)
    if layout.transposed:
        first, second = first.mT.contiguous(), second.mT.contiguous()
    x_TD = draw(tokens, model)
    experts_TK = choose(case, generator)
    weights_TK = torch.rand(tokens, top_k, generator=generator)
    if case.strided:
        x_TD, weights_TK = x_TD.T.contiguous().T, weights_TK.T.contiguous().T
        experts_TK = experts_TK.int()
        first = torch.stack([first, first], -1)[..., 1]
        second = torch.cat([second, second], 1)[:, : second.shape[1]]
    weights = ExpertWeights(
        gate_up=first,
        down=second,
        gate_up_bias=draw(experts, fused, scale=0.3) if case.bias else None,
        down_bias=draw(experts, model, scale=0.3) if case.bias else None,
    )
    return Layer(x_TD, weights, layout, experts_TK, weights_TK)


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative, in the 2-norm; the absolute where the exact result is 0."""
    ours, exact = ours.double(), exact.double()
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - exact).norm() / (exact.norm() or 1.0))


def fp32(case: Case, seed: int) -> dict[str, float]:
    layer = build(case, seed)
    experts = layer.weights.experts
    exact_sums, sums = Saliency.zeros(experts), Saliency.zeros(experts)
    exact = reference.moe_forward(*layer, dtype=torch.float64, saliency=exact_sums)
    ours = triton_forward.moe_forward(*layer, saliency=sums, config=case.config)
    rows = zip(sums.table_6E, exact_sums.table_6E, strict=True)
    return {
        "error": error(ours, exact),
        "eager": error(reference.moe_forward(*layer), exact),
        "saliency": max(error(a, b) for a, b in rows),
    }


def bf16(case: Case, seed: int) -> dict[str, float]:
    """A bf16 layer: the kernels emulate it in fp32, the eager reference computes in bf16."""
    layer = build(case, seed, bf16=True)
    exact = reference.moe_forward(*layer, dtype=torch.float64)
    ours = triton_forward.moe_forward(*layer, config=case.config, emulate_bf16=True)
    return {
        "error": error(ours, exact),
        "eager": error(reference.moe_forward(*layer, dtype=torch.bfloat16), exact),
        "rounded": torch.equal(ours, ours.bfloat16().float()),
    }


def same_bytes(case: Case) -> bool:
    layer = build(case, 0)
    runs = []
    for _ in range(2):
        sums = Saliency.zeros(layer.weights.experts)
        y_TD = triton_forward.moe_forward(*layer, saliency=sums, config=case.config)
        runs.append((y_TD.numpy().tobytes(), sums.table_6E.numpy().tobytes()))
    return runs[0] == runs[1]


def controls() -> dict[str, float]:
    """Errors of layers with one fault each: all must be noticed."""
    layer = build(Case(sizes=(25, 40, 24, 5, 3), bias=True), 0)
    sums, table = Saliency.zeros(5), Saliency.zeros(5)
    exact = reference.moe_forward(*layer, dtype=torch.float64, saliency=table)
    swapped = replace(layer.weights, gate_up=layer.weights.gate_up.roll(24, dims=1))
    dropped = layer.experts.clone()
    dropped[20, 1] = 5
    unbiased = replace(layer.weights, down_bias=None)
    faulty = {
        "gate and up swapped": layer._replace(weights=swapped),
        "interleaved": layer._replace(layout=ExpertLayout(interleaved=True)),
        "another activation": layer._replace(layout=ExpertLayout(activation="gelu")),
        "one slot dropped": layer._replace(experts=dropped),
        "a bias forgotten": layer._replace(weights=unbiased),
        "weights exchanged": layer._replace(gates=layer.gates.flip(1)),
    }
    errors = {
        name: error(triton_forward.moe_forward(*wrong), exact) for name, wrong in faulty.items()
    }
    wrong = faulty["one slot dropped"]
    triton_forward.moe_forward(*wrong, saliency=sums)
    return errors | {"saliency, one slot dropped": error(sums["gate"], table["gate"])}


def sorting() -> dict[str, bool]:
    """The sort against torch's stable one; 260 tiles of pairs, two steps of the scan."""
    ids_P = torch.randint(-1, 12, (33_280,), generator=torch.Generator().manual_seed(1))
    order = triton_forward.sort_pairs(ids_P[:, None], 10, 64)
    kept_P = torch.where((ids_P >= 0) & (ids_P < 10))[0]
    expected = kept_P[torch.sort(ids_P[kept_P], stable=True).indices]
    slots = torch.full_like(ids_P, -1)
    slots[expected] = torch.arange(len(expected))
    covered = torch.cat(
        [
            torch.arange(int(row), min(int(row) + 64, int(end)))
            for row, end, e in zip(order.row_B, order.end_B, order.expert_B, strict=True)
            if e >= 0
        ]
    )
    return {
        "pairs": torch.equal(order.pair_of_P[: len(expected)].long(), expected),
        "slots": torch.equal(order.slot_of_P.long(), slots),
        "totals": torch.equal(order.totals_E.long(), ids_P[kept_P].bincount(minlength=10)),
        "every row in one tile": torch.equal(covered, torch.arange(len(expected))),
    }


def families() -> dict[str, float]:
    """Logits of tiny models with the hook, against transformers' eager experts, in fp32."""
    torch.use_deterministic_algorithms(False)  # in models, it is none of our business
    name = hook.register(implementation="triton")
    errors = {}
    tokens = torch.arange(3, 27).reshape(2, 12)
    for family in FAMILIES:
        model = tiny_model(family)
        with torch.no_grad():
            model.set_experts_implementation("eager")
            eager = model(tokens).logits
            model.set_experts_implementation(name)
            errors[family] = error(model(tokens).logits, eager)
    return errors


def main(path: str) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and so torch.empty is NaN
    every = cases()
    some = [*list(every)[:12:3], "dropped", "tiles of the table"]
    result = {
        "fp32": {name: fp32(case, i) for i, (name, case) in enumerate(every.items())},
        "bf16": {name: bf16(every[name], i) for i, name in enumerate(some)},
        "same bytes": {name: same_bytes(every[name]) for name in ("dropped",)},
        "controls": controls(),
        "sorting": sorting(),
        "families": families(),
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
