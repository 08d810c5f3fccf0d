"""Saliency without output, and that of a hot expert, in Triton's interpreter; started by
`test_saliency.py` as `interpreter_matrix.py` is.

    TRITON_INTERPRET=1 python saliency_matrix.py out.json

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable

import torch
from interpreter_matrix import Case, Layer, build, error
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compose.kernels import launch_saliency, reference, triton_forward
from moe_compose.kernels.layout import ExpertLayout
from moe_compose.kernels.saliency import Saliency

#: One expert has 340 of 400 pairs: two rounds of its 4 shares of 64 rows.
HOT = Case(sizes=(400, 16, 16, 4, 1), config=None)
CASES = {
    "plain": Case(),
    "dropped": Case(routing="dropped", sizes=(25, 40, 24, 9, 3), bias=True),
    "all dropped": Case(routing="all dropped", sizes=(25, 40, 24, 9, 3)),
    "no token": Case(sizes=(0, 40, 24, 7, 3)),
    "interleaved": Case(
        layout=ExpertLayout(interleaved=True, transposed=True, activation="clamped_swiglu"),
        bias=True,
    ),
    "hot": HOT,
}


def layer_of(case: Case) -> Layer:
    layer = build(case, 0)
    if case is HOT:
        layer.experts[:, 0] = torch.arange(400) % 4
        layer.experts[80:, 0] = 2
    return layer


def tables(case: Case) -> dict[str, float | bool]:
    """Errors against fp64 with and without the output, and whether the two, and two runs, agree."""
    layer = layer_of(case)
    exact, alone, again, beside, eager = (Saliency.zeros(layer.weights.experts) for _ in range(5))
    reference.moe_forward(*layer, dtype=torch.float64, saliency=exact)
    reference.moe_saliency(*layer, eager, dtype=torch.float64)
    for saliency in (alone, again):
        triton_forward.moe_saliency(*layer, saliency, config=case.config)
    triton_forward.moe_forward(*layer, saliency=beside, config=case.config)
    rows = zip(alone.table_6E, exact.table_6E, strict=True)
    return {
        "error": max(error(ours, fp64) for ours, fp64 in rows),
        "eager": error(eager.table_6E, exact.table_6E),
        "same without output": torch.equal(alone.table_6E, beside.table_6E),
        "same again": alone.table_6E.numpy().tobytes() == again.table_6E.numpy().tobytes(),
    }


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and "empty" in str(function):
            self.largest = max(self.largest, made.numel())
        return made


def allocated(run: Callable[[Layer, Saliency], object]) -> int:
    layer = build(Case(sizes=(48, 512, 8, 4, 2)), 0)
    with Allocations() as seen:
        run(layer, Saliency.zeros(4))
    return seen.largest


def main(path: str) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    launch_saliency._ROWS, launch_saliency._SHARES = 64, 4
    torch.use_deterministic_algorithms(True)  # and so torch.empty is NaN
    result = {
        "tables": {name: tables(case) for name, case in CASES.items()},
        "alone": allocated(lambda layer, s: triton_forward.moe_saliency(*layer, s)),
        "beside": allocated(lambda layer, s: triton_forward.moe_forward(*layer, saliency=s)),
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
