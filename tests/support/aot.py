"""Kernels compiled ahead of time for accelerators that are not there, and what is asked of them.

    binary = compiled(triton_products.down, "sm_90", "bf16", constants, warps=8, stages=3)
    within_limits(binary)
    matrix_instructions(binary, rows=128)
    asynchronous(binary)
    no_atomics(binary)

Many at once, over processes, each once: `compile_all([Job.of(kernel, ...), ...])`.

An argument that ends in a shape (`x_TD`, `h_PF`, `ids_P`) is a pointer: to `element`, or, where the
shape counts pairs, tiles or experts (`_P`, `_B`, `_E`, `_LE`), to int32. `POINTERS` and the
`pointers` argument say otherwise, and may name scalars too: `pointers={"dgates_P": "fp32"}`. All
other arguments are int32, or constants.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_compose.kernels.configs import SHARED

#: arch → what triton compiles for.
TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Those that every run of the tests compiles for; the others are compiled with `-m slow`.
USUAL = ("sm_80", "sm_90", "gfx942")

#: What pointers are to, where their names don't tell.
POINTERS = {"gates_P": "fp32", "squares_NP": "fp32", "ids_P": "i64"} | dict.fromkeys(
    ("table_6E", "parts_5SE"), "fp64"
)

_SHAPE = re.compile(r"_([0-9A-Z]+)$")
_COUNTED = {"P", "B", "E", "LE"}
STACK = 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel to compile; equal jobs are compiled once."""

    kernel: str
    arch: str
    element: str
    constants: tuple[tuple[str, Any], ...]
    warps: int = 4
    stages: int = 2
    pointers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        kernel: Any,
        arch: str,
        element: str,
        constants: Mapping[str, Any],
        warps: int = 4,
        stages: int = 2,
        pointers: Mapping[str, str] | None = None,
    ) -> Job:
        """As the arguments of `compiled`."""
        return cls(
            kernel=f"{kernel.fn.__module__}:{kernel.fn.__name__}",
            arch=arch,
            element=element,
            constants=tuple(sorted(constants.items())),
            warps=warps,
            stages=stages,
            pointers=tuple(sorted((pointers or {}).items())),
        )


@dataclass(frozen=True, kw_only=True)
class Binary:
    """What came out.

    Attributes:
        job: of what.
        assembly: PTX, or AMD's.
        shared, stack: bytes of a program, and of a thread, spilled registers included.
        registers: of a thread.
        chained: a product is added to another's result, with nothing between.
    """

    job: Job
    assembly: str
    shared: int
    stack: int
    registers: int
    chained: bool

    def __repr__(self) -> str:
        constants = " ".join(f"{k}={v}" for k, v in self.job.constants)
        name, arch = self.job.kernel.rpartition(":")[2], self.job.arch
        return (
            f"{name} for {arch}, {self.job.element}, {self.job.warps} warps, {self.job.stages} "
            f"stages, {constants}: {self.registers} registers, {self.stack} bytes of stack, "
            f"{self.shared} of shared memory"
        )


def compiled(
    kernel: Any,
    arch: str,
    element: str,
    constants: Mapping[str, Any],
    warps: int = 4,
    stages: int = 2,
    pointers: Mapping[str, str] | None = None,
) -> Binary:
    """`kernel` as triton compiles it for 16-byte aligned tensors and strides.

    Args:
        kernel: a `triton.jit` function.
        arch: a key of `TARGETS`.
        element: what tensors hold: `bf16`, `fp16`, `fp32`.
        constants: all of the kernel's constexprs, and arguments that are 1.
        warps: threads of a program / 32, or 64 on AMD.
        stages: depth of the pipeline.
        pointers: name → kind of arguments, where the rule above does not tell.
    """
    job = Job.of(kernel, arch, element, constants, warps, stages, pointers)
    signature = _signature(kernel, element, constants, {**POINTERS, **(pointers or {})})
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind == "i32" and ("stride" in name or name.endswith("_offset")))
    }
    with _empty_cache() as folder:
        built = triton.compile(
            ASTSource(kernel, signature, dict(constants), aligned),
            target=TARGETS[arch],
            options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        )
        assembly = built.asm["amdgcn" if "amdgcn" in built.asm else "ptx"]
        stack, registers = _usage(built, folder)
    return Binary(
        job=job,
        assembly=assembly,
        shared=built.metadata.shared,
        stack=stack,
        registers=registers,
        chained=_chained(built.asm["ttir"]),
    )


def compile_all(jobs: Iterable[Job], workers: int = 2) -> list[Binary]:
    """Every job's binary, in order; equal jobs share one."""
    wanted = list(jobs)
    different = list(dict.fromkeys(wanted))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        binaries = dict(zip(different, pool.map(run, different), strict=True))
    return [binaries[job] for job in wanted]


def run(job: Job) -> Binary:
    """Compile one job, here."""
    module, _, name = job.kernel.partition(":")
    return compiled(
        getattr(import_module(module), name),
        job.arch,
        job.element,
        dict(job.constants),
        job.warps,
        job.stages,
        dict(job.pointers),
    )


def within_limits(binary: Binary) -> None:
    """The accelerator can start it, and it spills next to nothing."""
    assert binary.shared <= SHARED[binary.job.arch], binary
    assert binary.stack <= STACK, binary


def matrix_instructions(binary: Binary, rows: int) -> None:
    """Products run on tensor cores; from 64 rows on by the instructions that Hopper and Blackwell
    need for their full rate. Not for fp32.

    And for sm_100 no two that feed one accumulator: triton up to 3.8 miscompiles them in a loop
    (github.com/triton-lang/triton/issues/10821).
    """
    arch = binary.job.arch
    if arch.startswith("gfx"):
        wanted = "v_mfma"
    else:
        large = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"} if rows >= 64 else {}
        wanted = large.get(arch, "mma.sync")
    assert binary.job.element == "fp32" or wanted in binary.assembly, (wanted, binary)
    assert not (binary.job.arch == "sm_100" and binary.chained), binary


def asynchronous(binary: Binary) -> None:
    """Tiles are copied to shared memory while others are multiplied. Not for fp32, nor on AMD."""
    if binary.job.arch.startswith("sm") and binary.job.element != "fp32":
        assert re.search(r"cp\.async\.(c[ag]\.shared|bulk\.tensor)", binary.assembly), binary


def no_atomics(binary: Binary) -> None:
    """Sums are taken in the same order in every run."""
    found = re.search(r"^.*\b(atom|red)\.(global|gpu|relaxed)|global_atomic", binary.assembly, re.M)
    assert not found, binary


def _signature(
    kernel: Any, element: str, constants: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, str]:
    absent = [p.name for p in kernel.params if p.is_constexpr and p.name not in constants]
    unknown = constants.keys() - set(kernel.arg_names)
    assert not absent and not unknown, f"{kernel.fn.__name__}: absent {absent}, unknown {unknown}"

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        shape = _SHAPE.search(name)
        if shape is None:
            return kinds.get(name, "i32")
        return "*" + kinds.get(name, "i32" if shape[1] in _COUNTED else element)

    return {name: kind(name) for name in kernel.arg_names}


def _chained(ttir: str) -> bool:
    products = re.findall(r"(%\w+) = tt\.dot %[\w#]+, %[\w#]+, (%[\w#]+)", ttir)
    return bool({result for result, _ in products} & {accumulator for _, accumulator in products})


def _usage(built: Any, folder: Path) -> tuple[int, int]:
    """Bytes of stack, and registers, of a thread."""
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        stack = re.search(r"\.private_segment_fixed_size: (\d+)", text)
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    else:
        path = folder / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        stack, registers = re.search(r"STACK:(\d+)", text), re.search(r"REG:(\d+)", text)
    assert stack and registers, text[:2000]
    return int(stack[1]), int(registers[1])


@contextmanager
def _empty_cache() -> Iterator[Path]:
    """So that everything is compiled, and nothing is left behind."""
    with TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield Path(folder)
