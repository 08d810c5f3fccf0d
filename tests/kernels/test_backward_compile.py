"""Every kernel of the backward compiles for every accelerator of its table, within its limits.

    pytest tests/kernels/test_backward_compile.py            every configuration, in one layout
    pytest tests/kernels/test_backward_compile.py -m slow    in all; prints the registers with -s

Gates as in `test_compile.py`, and the forward's products as the backward uses them: with z stored,
with a low-rank addition, and `down` with the strides of the first matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from aot import (
    TARGETS,
    USUAL,
    Binary,
    Job,
    asynchronous,
    compile_all,
    matrix_instructions,
    no_atomics,
    within_limits,
)

from moe_compose.kernels import (
    configs,
    triton_backward,
    triton_low_rank,
    triton_products,
    triton_weight_gradient,
)
from moe_compose.kernels.backward_configs import HALF, SINGLE, BackwardConfig
from moe_compose.kernels.configs import Tile
from moe_compose.kernels.launch_backward import weight_tile
from moe_compose.kernels.launch_products import narrow

E, K = 128, 8
#: As dividing tiles, gpt-oss's, which tiles of 128 don't divide, and what nothing divides.
EVEN, UNEVEN, ODD = (2048, 768), (2880, 2880), (2049, 771)

#: What differs between layouts; strides that are 1 are constants.
LAYOUTS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "interleaved, transposed": {
        "INTERLEAVED": True,
        "ACTIVATION": "clamped_swiglu",
        "LIMIT": 7.0,
    },
    "not gated": {"GATED": False, "ACTIVATION": "gelu"},
}
LAYER = {
    "TOP_K": K,
    "GATED": True,
    "INTERLEAVED": False,
    "ACTIVATION": "silu",
    "ALPHA": 1.702,
    "LIMIT": None,
    "ROUND": False,
}
NO_LORA, LORA = {"RANK": 0, "BR": 16}, {"RANK": 16, "BR": 16, "lora_stride_r": 1}
WIDE_LORA = {"RANK": 64, "BR": 64, "lora_stride_r": 1}
PARTS = {"parts_NP": "fp32", "dgates_P": "fp32", "gates_P": "fp32", "scale": "fp32"}
Sizes = tuple[int, int]


def job(kernel: Any, arch: str, element: str, tile: Tile, constants: dict[str, Any]) -> Job:
    return Job.of(kernel, arch, element, constants, tile.warps, tile.stages, PARTS)


def tiled(config: BackwardConfig, tile: Tile) -> dict[str, int]:
    return {"BM": config.rows, "BN": tile.n, "BK": tile.k, "GROUP": config.group}


def hidden(
    arch: str,
    config: BackwardConfig,
    layout: str = "concatenated",
    element: str = "bf16",
    sizes: Sizes = EVEN,
    lora: dict[str, Any] = NO_LORA,
    full: bool = True,
) -> Job:
    turned = {"stride_d": 1} if "transposed" in layout else {"stride_f": 1}
    lora = {"lora_stride_f" if n == "lora_stride_r" else n: v for n, v in lora.items()}
    asked = {"GATES": True, "HIDDEN": full, "INPUT": True}
    sized = {"D": sizes[0], "F": sizes[1], **tiled(config, config.hidden)}
    constants = {**LAYER, **LAYOUTS[layout], **turned, **lora, **asked, **sized}
    return job(triton_backward.hidden_gradient, arch, element, config.hidden, constants)


def inputs(
    arch: str,
    config: BackwardConfig,
    layout: str = "concatenated",
    element: str = "bf16",
    sizes: Sizes = EVEN,
    lora: dict[str, Any] = NO_LORA,
) -> Job:
    """dX by `down`: P in the place of F."""
    turned = {"stride_f": 1} if "transposed" in layout else {"stride_d": 1}
    lora = {"lora_stride_d" if n == "lora_stride_r" else n: v for n, v in lora.items()}
    halves = 1 if layout == "not gated" else 2
    sized = {"D": sizes[0], "F": halves * sizes[1], **tiled(config, config.input)}
    off = {"BIAS": False, "SALIENCY": False, "SAVE_Y": True, "ROUND": False}
    constants = {**turned, **lora, **off, **sized}
    return job(triton_products.down, arch, element, config.input, constants)


def weight(
    arch: str,
    config: BackwardConfig,
    sides: tuple[int, int],
    gather: str,
    contiguous: str = "n",
    element: str = "bf16",
) -> Job:
    m, n = sides
    rows, columns, warps = weight_tile(config, m, n)
    constants = {
        "TOP_K": K,
        "M": m,
        "N": n,
        "GATHER_A": gather == "a",
        "GATHER_B": gather == "b",
        "PIPELINED": True,
        "ROUND": False,
        "BM": rows,
        "BN": columns,
        "BK": config.weight.k,
        f"out_stride_{contiguous}": 1,
    }
    tile = replace(config.weight, warps=warps)
    return job(triton_weight_gradient.weight_gradient, arch, element, tile, constants)


def project(
    arch: str, rows: int, tile: Tile, rank: int, gather: bool, element: str = "bf16"
) -> Job:
    constants = {
        "TOP_K": K,
        "C": EVEN[0],
        "R": rank,
        "GATHER": gather,
        "ROUND": False,
        "BM": rows,
        "BN": narrow(rank),
        "BK": tile.k,
        "stride_c" if gather else "stride_r": 1,
    }
    narrower = Tile(n=tile.n, k=tile.k, warps=4, stages=tile.stages)
    return job(triton_low_rank.project, arch, element, narrower, constants)


def z_again(
    arch: str, config: configs.Config, layout: str, lora: dict[str, Any], save_h: bool
) -> Job:
    """The forward's first product where z is stored."""
    turned: dict[str, Any] = {"stride_d": 1}
    if layout == "interleaved, transposed":
        turned = {"stride_f": 2, "up_offset": 1, "bias_stride_f": 2, "bias_up_offset": 1}
    tile, biased = config.first, {"BIAS": "transposed" in layout}
    sized = {"D": EVEN[0], "F": EVEN[1], "BM": config.rows, "BN": tile.n, "BK": tile.k}
    saved = {"SAVE_H": save_h, "SAVE_Z": True, "GROUP": config.group}
    constants = {**LAYER, **LAYOUTS[layout], **turned, **biased, **lora, **sized, **saved}
    return job(triton_products.gate_up, arch, "bf16", tile, constants)


def rest(arch: str) -> Iterator[Job]:
    """What only reads and adds."""
    tile = Tile(n=0, k=0, warps=4, stages=3)
    sums = {
        "TOP_K": K,
        "N": 2880,
        "PIPELINED": True,
        "ROUND": False,
        "BN": 64,
        "BK": 32,
        "out_stride_n": 1,
    }
    gates = {"TOP_K": K, "D": 2880, "COLUMNS": 6, "BP": 32, "BD": 128}
    for on in (False, True):
        yield job(triton_weight_gradient.bias_gradient, arch, "bf16", tile, {**sums, "ROUTED": on})
        yield job(triton_backward.gate_gradient, arch, "bf16", tile, {**gates, "BIAS": on})


def one_of_each(arch: str, config: BackwardConfig, forward: configs.Config) -> Iterator[Job]:
    yield hidden(arch, config)
    yield inputs(arch, config)
    yield weight(arch, config, EVEN, "a")
    yield project(arch, config.rows, config.hidden, 16, True)
    yield z_again(arch, forward, "concatenated", NO_LORA, False)
    yield from rest(arch)


def of_entry(arch: str, config: BackwardConfig) -> Iterator[Job]:
    model, width = EVEN
    for layout in LAYOUTS:
        for lora in (NO_LORA, LORA, WIDE_LORA):
            yield hidden(arch, config, layout, lora=lora)
            yield inputs(arch, config, layout, lora=lora)
        yield hidden(arch, config, layout, full=False)
        yield hidden(arch, config, layout, sizes=UNEVEN)
        yield inputs(arch, config, layout, sizes=UNEVEN)
    for contiguous in ("n", "m"):
        yield weight(arch, config, (model, width), "a", contiguous)
        yield weight(arch, config, (2 * width, model), "b", contiguous)
        yield weight(arch, config, UNEVEN, "a", contiguous)
    for rank in (16, 64):
        for gather in (False, True):
            yield project(arch, config.rows, config.hidden, rank, gather)
        yield weight(arch, config, (rank, model), "b")
        yield weight(arch, config, (rank, width), "")
        yield weight(arch, config, (2 * width, rank), "")
        yield weight(arch, config, (model, rank), "a")


def whole(arch: str) -> Iterator[Job]:
    for _, config in HALF[arch]:
        yield from of_entry(arch, config)
    yield hidden(arch, HALF[arch][0][1], element="fp16")
    yield weight(arch, HALF[arch][0][1], EVEN, "a", element="fp16")
    for _, config in SINGLE:
        yield hidden(arch, config, element="fp32")
        yield inputs(arch, config, element="fp32")
        yield weight(arch, config, EVEN, "a", element="fp32")
        yield project(arch, config.rows, config.hidden, 16, True, "fp32")
    for _, forward in configs.HALF[arch]:
        for layout in LAYOUTS:
            yield z_again(arch, forward, layout, NO_LORA, False)
            yield z_again(arch, forward, layout, LORA, True)
        yield project(arch, forward.rows, forward.second, 16, True)
    yield from rest(arch)


def odd(arch: str) -> Iterator[Job]:
    """Rows of odd length cannot be copied asynchronously."""
    for config in (c for _, c in HALF[arch] if c.fits(*ODD)):
        yield hidden(arch, config, sizes=ODD)
        yield inputs(arch, config, sizes=ODD)
        yield weight(arch, config, ODD, "a")


def check(binary: Binary, *, odd: bool = False) -> None:
    within_limits(binary)
    no_atomics(binary)
    constants = dict(binary.job.constants)
    if "BM" in constants:
        # Hopper's products take 64 rows; of a narrow weight gradient there are fewer.
        matrix_instructions(binary, constants["BM"])
        if not odd:
            asynchronous(binary)


def check_all(jobs: Iterator[Job], *, odd: bool = False) -> None:
    faults = []
    for binary in dict.fromkeys(compile_all(jobs)):
        print(binary)
        try:
            check(binary, odd=odd)
        except AssertionError as fault:
            faults.append(str(fault).splitlines()[0])
    assert faults == []


def test_every_configuration_in_one_layout():
    """With the forward's tiles as often as both tables have entries."""
    pairs = [
        (arch, backward, forward)
        for arch in USUAL
        for (_, backward), (_, forward) in zip(HALF[arch], configs.HALF[arch], strict=False)
    ]
    check_all(job for pair in pairs for job in one_of_each(*pair))
    left = [(a, c) for a in USUAL for _, c in HALF[a][len(configs.HALF[a]) :]]
    check_all(job for a, c in left for job in one_of_each(a, c, configs.HALF[a][0][1]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_configuration(arch):
    check_all(whole(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_odd_sizes(arch):
    check_all(odd(arch), odd=True)
