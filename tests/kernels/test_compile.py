"""Every shipped kernel compiles for every accelerator of the table, within its limits; no GPU.

    pytest tests/kernels/test_compile.py            every configuration, in one layout
    pytest tests/kernels/test_compile.py -m slow    in all; prints the table of registers with -s

Gates (`tests/support/aot.py`): no spilled registers (stack ≤ 32 bytes), shared memory within the
accelerator's, its largest matrix instructions where tiles are large enough, asynchronous copies, no
atomics.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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

from moe_compose.kernels import triton_combine, triton_products, triton_saliency, triton_sort
from moe_compose.kernels.configs import HALF, SINGLE, Config, Tile, config_for

D, F, E, K = 2048, 768, 128, 8

#: What the first product of each layout is compiled with; strides that are 1 are constants.
LAYOUTS = {
    "concatenated": {"stride_d": 1},
    "transposed": {"stride_f": 1, "ACTIVATION": "gelu"},
    "interleaved": {"stride_d": 1, "INTERLEAVED": True, "ACTIVATION": "gelu_tanh"},
    "interleaved, transposed, biased": {
        "stride_f": 2,
        "up_offset": 1,
        "INTERLEAVED": True,
        "BIAS": True,
        "bias_stride_f": 2,
        "bias_up_offset": 1,
        "ACTIVATION": "clamped_swiglu",
        "LIMIT": 7.0,
    },
    "not gated": {"stride_d": 1, "GATED": False, "ACTIVATION": "relu2"},
}
FIRST = {
    "TOP_K": K,
    "D": D,
    "F": F,
    "GATED": True,
    "INTERLEAVED": False,
    "BIAS": False,
    "ACTIVATION": "silu",
    "ALPHA": 1.702,
    "LIMIT": None,
    "RANK": 0,
    "BR": 16,
    "SAVE_H": True,
    "SAVE_Z": False,
    "ROUND": False,
}
SECOND = {"D": D, "F": F, "BIAS": False, "RANK": 0, "BR": 16, "ROUND": False, "stride_f": 1}

#: gpt-oss: tiles of 128 do not divide it; and sizes that nothing divides.
UNEVEN, ODD = {"D": 2880, "F": 2880}, {"D": 2049, "F": 771}


def products(
    arch: str, config: Config, first: dict, element: str = "bf16", sizes: dict | None = None
) -> Iterator[Job]:
    """Both products of a layer; the second with saliency, without, and for nothing else."""

    def job(kernel, tile: Tile, constants: dict) -> Job:
        tiles = {"BM": config.rows, "BN": tile.n, "BK": tile.k, "GROUP": config.group}
        constants = constants | tiles | (sizes or {})
        return Job.of(kernel, arch, element, constants, tile.warps, tile.stages)

    yield job(triton_products.gate_up, config.first, {**FIRST, **first})
    for saliency, save in ((False, True), (True, True), (True, False)):
        constants = {**SECOND, "SALIENCY": saliency, "SAVE_Y": save}
        if first.get("BIAS"):
            constants |= {"BIAS": True, "bias_stride_d": 1}
        if first.get("stride_f"):
            del constants["stride_f"]
            constants["stride_d"] = 1
        yield job(triton_products.down, config.second, constants)


def configs(arch: str, model: int = D, width: int = F) -> list[Config]:
    return [config for _, config in HALF[arch] if config.fits(model, width)]


def all_products(arch: str) -> Iterator[Job]:
    for layout in LAYOUTS.values():
        for config in configs(arch):
            yield from products(arch, config, layout)
    yield from products(arch, HALF[arch][0][1], LAYOUTS["concatenated"], "fp16")
    for _, config in SINGLE:
        yield from products(arch, config, LAYOUTS["concatenated"], "fp32")
    for config in configs(arch, 2880, 2880):
        layout = LAYOUTS["interleaved, transposed, biased"]
        yield from products(arch, config, layout, sizes=UNEVEN)
        yield from products(arch, config, LAYOUTS["concatenated"], sizes=UNEVEN)


def odd_products(arch: str) -> Iterator[Job]:
    """Rows of odd length cannot be copied asynchronously."""
    for config in configs(arch, 2049, 771):
        yield from products(arch, config, LAYOUTS["concatenated"], sizes=ODD)


def sort_and_combine(arch: str) -> Iterator[Job]:
    for kernel, constants in (
        (triton_sort.histogram, {"E": E, "BE": 128, "BP": 128}),
        (triton_sort.scan, {"E": E, "BL": 256}),
        (triton_sort.schedule, {"ROWS": 128, "E": 2 * E, "E_PADDED": 2 * E, "BB": 32}),
        (triton_sort.scatter, {"E": E, "BP": 128}),
        (triton_combine.combine, {"TOP_K": K, "D": D, "ROUND": False, "BD": 1024}),
        (triton_saliency.partial_sums, {"E": E, "COLUMNS": 16, "SHARES": 16, "BP": 256}),
        (triton_saliency.add_sums, {"E": E, "SHARES": 16, "BE": 64}),
    ):
        yield Job.of(kernel, arch, "bf16", constants)


def check(binary: Binary) -> None:
    within_limits(binary)
    no_atomics(binary)
    constants = dict(binary.job.constants)
    if "BK" in constants:
        matrix_instructions(binary, constants["BM"])
        if constants["D"] != ODD["D"]:
            asynchronous(binary)


def check_all(jobs: list[Job]) -> None:
    faults = []
    for binary in dict.fromkeys(compile_all(jobs)):
        print(binary)
        try:
            check(binary)
        except AssertionError as fault:
            faults.append(str(fault).splitlines()[0])
    assert faults == []


def test_every_configuration_in_one_layout():
    layout = LAYOUTS["concatenated"]
    jobs = [j for a in USUAL for c in configs(a) for j in products(a, c, layout)]
    check_all([*jobs, *(j for arch in USUAL for j in sort_and_combine(arch))])


def test_every_kernel_that_is_launched_is_compiled_here():
    """`module.kernel[grid](...)` in the library; `module.kernel` in the compile tests."""
    launched = set()
    for path in Path(triton_sort.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).split(".")[-1])
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*compile.py"))
    assert len(launched) >= 14
    assert {name for name in launched if not re.search(rf"\.{name}\b", tests)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_and_configuration(arch):
    check_all([*all_products(arch), *odd_products(arch), *sort_and_combine(arch)])


@pytest.mark.slow
def test_counts_of_one():
    """Triton makes constants of arguments that are 1."""
    alone = [
        (triton_sort.histogram, {"pairs": 1, "E": 1, "BE": 1, "BP": 128}),
        (triton_sort.scan, {"tiles": 1, "E": 1, "BL": 256}),
        (triton_sort.schedule, {"blocks": 1, "ROWS": 16, "E": 1, "E_PADDED": 1, "BB": 32}),
        (triton_sort.scatter, {"pairs": 1, "E": 1, "BP": 128}),
        (triton_saliency.partial_sums, {"pairs": 1, "E": 1, "COLUMNS": 1, "SHARES": 16, "BP": 256}),
    ]
    check_all([Job.of(kernel, "sm_90", "bf16", constants) for kernel, constants in alone])


@pytest.mark.parametrize("arch", HALF)
def test_the_table_has_an_answer_for_every_layer(arch):
    for rows in (0, 0.1, 1, 32, 33, 255, 256, 1e6):
        for size in (2, 4):
            for model, width in ((2048, 768), (2880, 2880), (45, 19)):
                assert config_for(arch, rows, size, model, width) is not None
    assert config_for("sm_75", 100, 2, D, F) is None
    assert [config_for("sm_90", 1e4, 2, D, f).second.n for f in (768, 771)] == [256, 128]
