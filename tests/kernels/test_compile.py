"""Every shipped kernel compiles for every accelerator of the table, within its limits; no GPU.

    pytest tests/kernels/test_compile.py            one configuration each
    pytest tests/kernels/test_compile.py -m slow    all

Gates: no spilled registers (stack ≤ 32 bytes), shared memory within the accelerator's, Hopper's
matrix instructions where tiles are large enough for them, asynchronous copies.
"""

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moe_compose.kernels import triton_combine, triton_products, triton_sort  # noqa: E402
from moe_compose.kernels.configs import HALF, SINGLE, Config, Tile, config_for  # noqa: E402

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
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
    "ROUND": False,
}
SECOND = {"D": D, "F": F, "BIAS": False, "SALIENCY": False, "ROUND": False, "stride_f": 1}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, arch: str, element: str, constants: dict, warps: int = 4, stages: int = 2):
    """`kernel` as triton compiles it for 16-byte aligned tensors and strides."""
    pointers = {"x_TD", "w_EPD", "bias_EP", "h_PF", "w_EDF", "bias_ED", "y_PD", "out_TD"}
    wide = {"gates_P": "*fp32", "squares_NP": "*fp32", "table_6E": "*fp64", "ids_P": "*i64"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in pointers:
            return f"*{element}"
        counted = name.endswith(("_P", "_B", "_E", "_LE"))
        return wide.get(name, "*i32" if counted else "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(signature.items())
        if type_[0] == "*" or (type_ == "i32" and ("stride" in name or name == "up_offset"))
    }
    target, _ = TARGETS[arch]
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=target,
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def stack_bytes(binary, folder: Path) -> int:
    """Of a thread, spilled registers included."""
    if "amdgcn" in binary.asm:
        return int(re.search(r"private_segment_fixed_size: (\d+)", binary.asm["amdgcn"])[1])
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def within_limits(binary, arch: str, folder: Path) -> None:
    assert binary.metadata.shared <= TARGETS[arch][1]
    assert stack_bytes(binary, folder) <= 32


def products(config: Config, first: dict):
    """Both products of a layer: kernel, constants, tile."""

    def sized(tile: Tile) -> dict:
        return {"BM": config.rows, "BN": tile.n, "BK": tile.k, "GROUP": config.group}

    yield triton_products.gate_up, {**FIRST, **first, **sized(config.first)}, config.first
    for saliency in (False, True):
        constants = {**SECOND, "SALIENCY": saliency, **sized(config.second)}
        if first.get("BIAS"):
            constants |= {"BIAS": True, "bias_stride_d": 1}
        if first.get("stride_f"):
            del constants["stride_f"]
            constants["stride_d"] = 1
        yield triton_products.down, constants, config.second


def check_products(arch: str, config: Config, first: dict, element: str, folder: Path) -> None:
    for kernel, constants, tile in products(config, first):
        binary = compiled(kernel, arch, element, constants, tile.warps, tile.stages)
        within_limits(binary, arch, folder)
        if element != "fp32" and arch.startswith("sm"):
            ptx = binary.asm["ptx"]
            assert "cp.async" in ptx, constants
            if arch == "sm_90" and config.rows >= 64:
                assert "wgmma" in ptx, constants


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_products_of_many_rows(arch, tmp_path):
    check_products(arch, config_for(arch, 1024, 2, D, F), LAYOUTS["concatenated"], "bf16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", TARGETS)
def test_the_products_of_every_configuration(arch, layout, tmp_path):
    for _, config in HALF[arch]:
        check_products(arch, config, LAYOUTS[layout], "bf16", tmp_path)
    check_products(arch, HALF[arch][0][1], LAYOUTS[layout], "fp16", tmp_path)
    for _, config in SINGLE:
        check_products(arch, config, LAYOUTS[layout], "fp32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_odd_sizes(arch, tmp_path):
    sizes = {"D": 2049, "F": 771}
    for config in (c for _, c in HALF[arch] if c.fits(2049, 771)):
        for kernel, constants, tile in products(config, {"stride_d": 1}):
            constants |= sizes
            binary = compiled(kernel, arch, "bf16", constants, tile.warps, tile.stages)
            within_limits(binary, arch, tmp_path)


@pytest.mark.slow
def test_counts_of_one():
    """Triton makes constants of arguments that are 1."""
    build = partial(compiled, arch="sm_90", element="bf16")
    build(triton_sort.histogram, constants={"pairs": 1, "E": 1, "BE": 1, "BP": 128})
    build(triton_sort.scan, constants={"tiles": 1, "E": 1, "BL": 256})
    build(
        triton_sort.schedule, constants={"blocks": 1, "ROWS": 16, "E": 1, "E_PADDED": 1, "BB": 32}
    )
    build(triton_sort.scatter, constants={"pairs": 1, "E": 1, "BP": 128})
    build(triton_combine.add_saliency, constants={"pairs": 1, "E": 1, "COLUMNS": 1, "BP": 256})
    for kernel, constants, _ in products(config_for("sm_90", 1, 2, D, F), {"stride_d": 1}):
        if "pairs" in kernel.arg_names:
            constants |= {"pairs": 1}
        build(kernel, constants={**constants, "blocks": 1})


@pytest.mark.parametrize(
    "arch", [a if a == "sm_90" else pytest.param(a, marks=pytest.mark.slow) for a in TARGETS]
)
def test_sort_and_combine(arch, tmp_path):
    build = partial(compiled, arch=arch, element="bf16")
    for binary in (
        build(triton_sort.histogram, constants={"E": E, "BE": 128, "BP": 128}),
        build(triton_sort.scan, constants={"E": E, "BL": 256}),
        build(
            triton_sort.schedule, constants={"ROWS": 128, "E": 2 * E, "E_PADDED": 2 * E, "BB": 32}
        ),
        build(triton_sort.scatter, constants={"E": E, "BP": 128}),
        build(triton_combine.combine, constants={"TOP_K": K, "D": D, "ROUND": False, "BD": 1024}),
        build(triton_combine.add_saliency, constants={"E": E, "COLUMNS": 16, "BP": 256}),
    ):
        within_limits(binary, arch, tmp_path)
        assert "atom" not in binary.asm.get("ptx", "")


@pytest.mark.parametrize("arch", HALF)
def test_the_table_has_an_answer_for_every_layer(arch):
    for rows in (0, 0.1, 1, 32, 33, 255, 256, 1e6):
        for size in (2, 4):
            for model, width in ((2048, 768), (2880, 2880), (45, 19)):
                assert config_for(arch, rows, size, model, width) is not None
    assert config_for("sm_86", 100, 2, D, F) is None
    assert [config_for("sm_90", 1e4, 2, D, width).rows for width in (768, 771)] == [128, 64]
