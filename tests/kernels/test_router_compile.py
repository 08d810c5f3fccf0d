"""The router's and the saliency kernels compile for every accelerator of the table; no GPU.

    pytest tests/kernels/test_router_compile.py            one scheme, for every accelerator
    pytest tests/kernels/test_router_compile.py -m slow    all

The gates are those of `tests/support/aot.py`; the second product is compiled without its output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from aot import Job, asynchronous, compile_all, matrix_instructions, no_atomics, within_limits

from moe_compose.architectures.routing_form import Routing
from moe_compose.kernels import (
    launch_saliency,
    router,
    triton_products,
    triton_router,
    triton_router_backward,
)
from moe_compose.kernels import triton_saliency as saliency
from moe_compose.kernels.configs import HALF

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
POINTERS = {
    "weights_TK": "fp32",
    "grad_TK": "fp32",
    "experts_TK": "i64",
    "given_TK": "i64",
    "bias_E": "fp32",
    "scale_E": "fp32",
    "parts_5SE": "fp64",
}
SOFTMAX = Routing(score="softmax", renormalise=True)
V3 = Routing(
    score="sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, selection_bias=True,
    groups=8, top_groups=4,
)  # fmt: skip
#: Scheme, E, k: of Qwen3-30B, DeepSeek-V3, gpt-oss, DeepSeek-V4, Laguna, PhiMoE, DBRX, Gemma 4.
ROUTERS: tuple[tuple[Routing, int, int], ...] = (
    (SOFTMAX, 128, 8),
    (V3, 256, 8),
    (Routing(score="topk_softmax"), 32, 4),
    (replace(V3, score="sqrtsoftplus", groups=1), 384, 6),
    (Routing(score="sigmoid", renormalise=True, softcap=30.0), 256, 10),
    (Routing(score="sparsemixer"), 16, 2),
    (replace(SOFTMAX, norm_p=3.0), 16, 4),
    (replace(SOFTMAX, expert_scale=True), 128, 8),
    (replace(V3, score="softmax", group_score="max", groups=5), 160, 6),
    (Routing(score="topk_sigmoid"), 1, 1),
    (SOFTMAX, 2048, 64),
)


def routers(arch: str, element: str = "bf16", some: slice = slice(None)) -> Iterator[Job]:
    for routing, experts, top_k in ROUTERS[some]:
        sizes, scaled = (routing, experts, top_k), routing.expert_scale
        for given in (False, True) if routing.score == "sqrtsoftplus" else (False,):
            biased = routing.selection_bias and not given
            options = router.forward_options(*sizes, biased=biased, scaled=scaled, given=given)
            yield job(triton_router.forward, arch, element, options)
        options = router.backward_options(*sizes, scaled=scaled)
        yield job(triton_router_backward.backward, arch, element, options)


def job(kernel: Any, arch: str, element: str, options: dict[str, Any]) -> Job:
    options = dict(options)
    assert options.pop("enable_fp_fusion")
    warps = options.pop("num_warps", 4)
    return Job.of(kernel, arch, element, options, warps, options.pop("num_stages", 2), POINTERS)


def sums(arch: str, experts: int, pairs: int | None = None) -> Iterator[Job]:
    """Of saliency; triton makes a constant of a count that is 1."""
    sizes = {"E": experts, "enable_fp_fusion": True}
    one = {} if pairs is None else {"pairs": pairs}
    for shares in (1, 16) if pairs is None else (1,):
        rows = {**sizes, **one, "COLUMNS": 16, "SHARES": shares, "BP": launch_saliency._ROWS}
        yield job(saliency.partial_sums, arch, "bf16", rows)
        experts_at_once = {**sizes, "SHARES": shares, "BE": launch_saliency._EXPERTS}
        yield job(saliency.add_sums, arch, "bf16", experts_at_once)


def second_products(arch: str, element: str = "bf16") -> Iterator[Job]:
    """Without their output, `[out, in]` and `[in, out]` with a bias."""
    sizes = {"D": 2048, "F": 768, "RANK": 0, "BR": 16, "SALIENCY": True, "SAVE_Y": False}
    layouts = (
        {"BIAS": False, "stride_f": 1},
        {"BIAS": True, "stride_d": 1, "bias_stride_d": 1},
    )
    for (_, config), layout in itertools.product(HALF[arch], layouts):
        tile = config.second
        tiles = {"BM": config.rows, "BN": tile.n, "BK": tile.k, "GROUP": config.group}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        options = {**sizes, **layout, **tiles, "ROUND": False, **launch}
        yield job(triton_products.down, arch, element, options)


def check_all(jobs: list[Job]) -> None:
    faults = []
    for binary in dict.fromkeys(compile_all(jobs)):
        print(binary)
        try:
            within_limits(binary)
            no_atomics(binary)
            constants = dict(binary.job.constants)
            if "BN" in constants:
                matrix_instructions(binary, constants["BM"])
                asynchronous(binary)
        except AssertionError as fault:
            faults.append(str(fault).splitlines()[0])
    assert faults == []


def test_one_scheme_everywhere():
    jobs = [j for arch in ARCHS for j in routers(arch, some=slice(1, 2))]
    check_all([*jobs, *list(sums("sm_90", 128))[2:]])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_all(arch):
    few = [*sums(arch, 1, 1), *routers(arch, "fp32", slice(3)), *routers(arch, "fp16", slice(1))]
    check_all([*routers(arch), *sums(arch, 128), *second_products(arch), *few])
