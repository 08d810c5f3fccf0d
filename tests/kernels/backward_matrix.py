"""Runs the backward in Triton's interpreter and writes every error as JSON; started by
`test_backward.py` in a process of its own.

    TRITON_INTERPRET=1 python backward_matrix.py out.json

Cases and fresh memory that is NaN are `interpreter_matrix.py`'s. Exact gradients are autograd's
through the eager reference, in fp64.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, R rank.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from typing import Any

import torch
from backward_cases import FORWARD, LARGE, backward_cases, eager, give, triton
from interpreter_matrix import Case, error
from tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compose.kernels import backward, hook, moe_forward, triton_forward
from moe_compose.kernels.gradients import LORA, NAMES, WEIGHTS, Call, Layer, gradients
from moe_compose.kernels.layout import ExpertLayout

FROZEN = frozenset({"x", "gates"})
ADAPTED = FROZEN | set(LORA)
FULL = FROZEN | set(WEIGHTS)
#: As transformers' families have them: gated, biased and interleaved, not gated.
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")


def compared(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: error(ours[name], exact[name]) for name in exact}


def ranks_of(i: int) -> tuple[int, int]:
    return ((3, 0), (0, 1), (8, 17), (1, 5))[i % 4]


def fp32(case: Case, i: int) -> dict[str, float]:
    """Every gradient; adapters on every second case, z kept on every third."""
    given = give(case, i, ranks_of(i // 2) if i % 2 else (0, 0))
    wanted = frozenset(NAMES)
    ours = triton(given, wanted, case, save_z=i % 3 == 0)
    return compared(ours, eager(given, wanted, torch.float64))


def bf16(case: Case, i: int) -> dict[str, dict[str, float]]:
    """A bf16 layer: the kernels emulate it in fp32, the eager reference computes in bf16.

    48 tokens: of a few, rounding errors are a matter of luck.
    """
    case = replace(case, sizes=(48, *case.sizes[1:]))
    given = give(case, i, ranks_of(i) if i % 2 else (0, 0), bf16=True)
    wanted = frozenset(NAMES)
    exact = eager(given, wanted, torch.float64)
    ours = triton(given, wanted, case, emulate_bf16=True)
    return {
        "error": compared(ours, exact),
        "eager": compared(eager(given, wanted, torch.bfloat16), exact),
        "rounded": all(
            torch.equal(t, t.bfloat16().float()) for n, t in ours.items() if n != "gates"
        ),
    }


def same_bytes(case: Case) -> bool:
    """Of two runs; the second keeps z, which in fp32 is what the first computes again."""
    given, wanted = give(case, 0, (3, 4)), frozenset(NAMES)
    runs = [triton(given, wanted, case, save_z=keep) for keep in (False, True)]
    one, other = ({n: t.numpy().tobytes() for n, t in run.items()} for run in runs)
    return one == other


class Made(TorchDispatchMode):
    """Shapes of all tensors that are made, not of views and aliases."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(made, Tensor) and any(n in name for n in ("empty", "zeros", "clone", "copy")):
            self.shapes.add(tuple(made.shape))
        return made


def made_by(wanted: frozenset[str]) -> dict[str, Any]:
    """Which gradients came out, and the matrices per expert that the backward made."""
    case = Case(sizes=(25, 40, 24, 5, 3), bias=True, config=FORWARD)
    given, leaves = give(case, 0, (2, 2)).with_leaves(wanted, torch.float32)
    x, weights, layout, experts, gates = given.layer
    call = Call(layout=layout, config=case.config, backward_config=LARGE)
    y_TD = backward.moe_forward(x, weights, experts, gates, call, given.lora)
    with Made() as made:
        y_TD.backward(given.dout)
    return {
        "gradients": sorted(n for n, t in given.named().items() if t.grad is not None),
        "wanted": sorted(leaves),
        "matrices": sorted(shape for shape in made.shapes if len(shape) == 3),
    }


def faults(layer: Layer) -> dict[str, tuple[Layer, str]]:
    """Backwards with one fault each, and the gradient that must notice."""
    trace, plan, call = layer.trace, layer.plan, layer.call
    z = trace.z_PP
    slots = plan.order.slot_of_P.clone()
    slots[31] = -1
    dropped = plan._replace(order=plan.order._replace(slot_of_P=slots))
    act = replace(call, layout=ExpertLayout(activation="gelu"))
    unlimited = replace(call, layout=ExpertLayout())
    unbiased = replace(layer.weights, down_bias=None)
    unweighted = trace._replace(gates_P=torch.ones_like(trace.gates_P))
    return {
        "another activation": (layer._replace(call=act), "x"),
        "the limit forgotten": (layer._replace(call=unlimited), "x"),
        "a bias forgotten": (layer._replace(weights=unbiased), "gates"),
        "gate and up swapped": (layer._replace(trace=trace._replace(z_PP=z.roll(24, 1))), "x"),
        "one slot dropped": (layer._replace(plan=dropped), "x"),
        "one gate dropped": (layer._replace(plan=dropped), "gates"),
        "g forgotten in dX": (layer._replace(trace=unweighted), "x"),
        "g forgotten in dW": (layer._replace(trace=unweighted), "down"),
        "g forgotten in db": (layer._replace(trace=unweighted), "down_bias"),
        "LoRA's scale": (layer._replace(lora=replace(layer.lora, scale=1.0)), "down_b"),
        "A_1 forgotten": (
            layer._replace(lora=replace(layer.lora, gate_up_a=None, gate_up_b=None)),
            "x",
        ),
    }


def controls() -> dict[str, float]:
    """Errors of backwards with one fault each; and of the one without, which must be small."""
    case = Case(sizes=(25, 40, 24, 5, 3), bias=True, layout=ExpertLayout(limit=0.7), config=FORWARD)
    given, wanted = give(case, 0, (2, 3)), frozenset(NAMES)
    exact = eager(given, wanted, torch.float64)
    (x, weights, layout, experts, gates), lora = given.layer, given.lora
    _, trace = triton_forward.traced(
        x, weights, layout, experts, gates, lora=lora, config=case.config, save_z=True
    )
    call = Call(layout=layout, scale=lora.scale, backward_config=LARGE)
    layer = Layer.of(call, x, experts, weights, lora, trace)

    def noticed(wrong: Layer, name: str) -> float:
        found = gradients(given.dout, wrong, frozenset({name}), torch.float32)
        return error(found[name], exact[name])

    errors = {name: noticed(*fault) for name, fault in faults(layer).items()}
    return errors | {"none": max(noticed(layer, name) for name in exact)}


def trained(family: str, implementation: str) -> dict[str, Tensor]:
    """All gradients of one step's loss, and the parameters after it."""
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    tokens = torch.arange(3, 27).reshape(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return found | {f"{n}, after a step": p.detach() for n, p in model.named_parameters()}


def families() -> dict[str, dict[str, float]]:
    """One training step of tiny models with the hook, against transformers' eager experts."""
    torch.use_deterministic_algorithms(False)  # in models, it is none of our business
    name = hook.register(implementation="triton")
    errors = {}
    for family in FAMILIES:
        exact, ours = trained(family, "eager"), trained(family, name)
        assert exact.keys() == ours.keys()
        worst = compared(ours, exact)
        routers = [e for n, e in worst.items() if "gate.weight" in n or "router" in n]
        embedding = [e for n, e in worst.items() if "embed" in n]
        errors[family] = {
            "all": max(worst.values()),
            "router": max(routers),
            "embedding": max(embedding),
        }
    return errors


def adapters_of_another_dtype() -> dict[str, float]:
    """`moe_forward`, as called; adapters in fp64 beside an fp32 layer, gradients through casts."""
    given = give(Case(), 4, (3, 4))
    exact = eager(given, ADAPTED, torch.float64)
    ours, leaves = given.with_leaves(ADAPTED, torch.float32)
    wide = {n: leaves[n].detach().double().requires_grad_() for n in LORA}
    lora = replace(ours.lora, **wide)
    moe_forward(*ours.layer, lora=lora, implementation="triton").backward(ours.dout)
    found = {n: wide.get(n, leaves[n]).grad for n in leaves}
    assert all(found[n].dtype == torch.float64 for n in wide)
    return compared(found, exact)


def main(path: str) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and so torch.empty is NaN
    every = backward_cases()
    some = [*list(every)[1:12:5], "dropped", "not gated relu2 transposed=False"]
    result = {
        "fp32": {name: fp32(case, i) for i, (name, case) in enumerate(every.items())},
        "bf16": {name: bf16(every[name], i) for i, name in enumerate(some)},
        "same bytes": same_bytes(every["strided"]),
        "made": {n: made_by(w) for n, w in (("frozen", FROZEN), ("adapted", ADAPTED))}
        | {"full": made_by(FULL), "gates": made_by(frozenset({"gates"}))},
        "controls": controls(),
        "another dtype": adapters_of_another_dtype(),
        "families": families(),
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
