# mypy: disable-error-code="import-untyped"
"""Search for the fastest configuration of a layer on the device that is there.

For every number of rows that a tile may sensibly have, the first product's tile is varied beside
the table's second, then the second beside the best first. A configuration is timed only after it
gave the reference's numbers; one that does not compile is passed over. Frozen experts, forward
only: the backward has a table of its own.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch
from torch import Tensor

from moe_compose.errors import MoeComposeError, OptionError
from moe_compose.kernels import reference
from moe_compose.kernels.configs import HALF, SHARED, Config, Tile, arch_of, table_entry
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.selfcheck import Layer, distance
from moe_compose.kernels.timing import seconds
from moe_compose.kernels.tuned import Entry

log = logging.getLogger(__name__)

#: A configuration is exact if its error is at most this times that of the eager reference.
FACTOR, LEAST = 1.5, 2e-6

#: Registers of a thread that accumulators may take; of 255.
_ACCUMULATORS = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer's sizes.

    Attributes:
        model, width, experts, top_k: D, F, E, K.
    """

    model: int
    width: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        sizes = (self.model, self.width, self.experts, self.top_k)
        if min(sizes) < 1 or self.top_k > self.experts:
            raise OptionError(f"D, F, E, K ({sizes}) must be positive, and K at most E")


def check_device(device: torch.device) -> str:
    """The arch of a device on which configurations can be tried.

    Raises:
        MoeComposeError: there is none.
    """
    if device.type == "cpu":
        from moe_compose.kernels.triton_forward import INTERPRETED

        if not INTERPRETED:
            raise MoeComposeError(
                "tuning needs a GPU (device cpu)",
                hint="Pass --device cuda on a machine that has one. TRITON_INTERPRET=1 tries "
                "tiny shapes on a CPU; its timings mean nothing.",
            )
        return "interpreter"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise MoeComposeError(
            f"tuning needs a GPU (device {device}, and torch {torch.__version__} sees none)",
            hint="Run it on a machine with an NVIDIA or AMD card, and a torch built for it.",
        )
    arch = arch_of(device)
    if arch not in HALF:
        raise MoeComposeError(
            f"no tiles are known for {arch} (known: {', '.join(SHARED)})",
            hint="Run it on another card.",
        )
    return arch


def tune(
    shape: Shape,
    tokens: int,
    device: torch.device,
    *,
    layout: ExpertLayout | None = None,
    repeats: int = 20,
    report: Callable[[str], None] = log.info,
) -> Entry:
    """The fastest configuration for `shape` and T = `tokens`.

    Args:
        shape: the layer's sizes.
        tokens: T; the router is random, so rows per expert are T·K / E on average.
        device: what `check_device` passed. bf16 on a GPU, fp32 in the interpreter.
        layout: how the experts lie; gate and up concatenated if not given.
        repeats: how often each is timed.
        report: is told of every configuration that was better than all before.

    Raises:
        MoeComposeError: none was exact, the table's included.
    """
    arch = check_device(device)
    dtype = torch.float32 if arch == "interpreter" else torch.bfloat16
    search = _Search(random_layer(shape, tokens, device, dtype, layout), repeats, report)
    rows = tokens * shape.top_k / shape.experts
    table = table_entry(arch, rows, dtype.itemsize, shape.model, shape.width)
    search.attempt(table)
    table_seconds = search.seconds
    for height in heights(rows):
        start = replace(table, rows=height, even=False)
        best = search.among(first_tiles(arch, height, dtype.itemsize, start), start)
        search.among(second_tiles(arch, height, dtype.itemsize, best), best)
    if search.best is None:
        raise MoeComposeError(
            f"no configuration gave the reference's numbers on {arch}",
            hint="Nothing was written. The eager reference and grouped_mm still run.",
        )
    return Entry(
        model=shape.model,
        width=shape.width,
        experts=shape.experts,
        top_k=shape.top_k,
        tokens=tokens,
        element_bytes=dtype.itemsize,
        seconds=search.seconds,
        table_seconds=table_seconds,
        error=search.error,
        tried=len(search.times),
        config=search.best,
    )


def facts(device: torch.device) -> dict[str, str]:
    """Where something was measured, for the file."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return {
        "arch": arch_of(device),
        "device": name,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def heights(rows_per_expert: float) -> list[int]:
    """Rows of a tile that are worth trying: half to twice what an expert has."""
    rows = min(128, max(16, rows_per_expert))
    return [n for n in (16, 32, 64, 128) if rows / 2 <= n <= 2 * rows]


def first_tiles(arch: str, rows: int, size: int, config: Config) -> Iterator[Config]:
    """`config` with every first tile that the accelerator can hold, gate and up both counted."""
    for tile in _tiles(arch, rows, size, (32, 64, 128), 2):
        yield replace(config, first=tile)


def second_tiles(arch: str, rows: int, size: int, config: Config) -> Iterator[Config]:
    """`config` with every second tile that the accelerator can hold."""
    for tile in _tiles(arch, rows, size, (64, 128, 256), 1):
        yield replace(config, second=tile)


def shared_bytes(arch: str, rows: int, columns: int, k: int, stages: int, size: int) -> int:
    """What a product keeps in shared memory: Hopper and sm_100 hold a tile per stage, the others
    one less."""
    held = stages if arch in ("sm_90", "sm_100") else max(1, stages - 1)
    return held * (rows + columns) * k * size


def _tiles(
    arch: str, rows: int, size: int, columns: Sequence[int], matrices: int
) -> Iterator[Tile]:
    if arch == "interpreter":
        yield from (Tile(n=n, k=32, warps=4, stages=1) for n in columns[:2])
        return
    lanes = 64 if arch.startswith("gfx") else 32
    steps = (64, 128) if arch in ("sm_90", "sm_100") else (32, 64, 128)
    for n in columns:
        for k in steps:
            for warps in (4, 8):
                accumulators = rows * n * matrices // (lanes * warps)
                if accumulators > _ACCUMULATORS or (warps == 8 and accumulators < 16):
                    continue
                for stages in (2,) if lanes == 64 else (3, 4, 5):
                    if shared_bytes(arch, rows, n * matrices, k, stages, size) <= SHARED[arch]:
                        yield Tile(n=n, k=k, warps=warps, stages=stages)


def random_layer(
    shape: Shape,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: ExpertLayout | None = None,
) -> Layer:
    """Weights and tokens of an initialised layer and a random router, drawn on the device."""
    layout = layout or ExpertLayout()
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        drawn = torch.empty(sizes, dtype=dtype, device=device)
        return drawn.normal_(std=scale, generator=generator)

    model, width, experts = shape.model, shape.width, shape.experts
    fused = width * (2 if layout.gated else 1)
    first, second = (experts, fused, model), (experts, model, width)
    if layout.transposed:
        first, second = (experts, model, fused), (experts, width, model)
    weights = ExpertWeights(
        gate_up=draw(*first, scale=model**-0.5), down=draw(*second, scale=width**-0.5)
    )
    scores = torch.rand(tokens, experts, generator=generator, device=device)
    gates_TK, ids_TK = scores.softmax(-1).topk(shape.top_k)
    gates_TK /= gates_TK.sum(-1, keepdim=True)
    return Layer(draw(tokens, model), weights, layout, ids_TK, gates_TK)


class _Search:
    """The best so far; no configuration is tried twice."""

    def __init__(self, layer: Layer, repeats: int, report: Callable[[str], None]) -> None:
        self.layer, self.repeats, self.report = layer, repeats, report
        self.exact = reference.moe_forward(*layer, dtype=torch.float32)
        eager = distance(reference.moe_forward(*layer), self.exact)
        self.allowed = max(FACTOR * eager, LEAST)
        self.times: dict[Config, float] = {}
        self.best: Config | None = None
        self.seconds, self.error = float("inf"), float("nan")

    def among(self, candidates: Iterator[Config], otherwise: Config) -> Config:
        """The fastest of them; `otherwise` if none runs."""
        timed = {config: self.attempt(config) for config in candidates}
        best = min(timed, key=lambda config: timed[config], default=otherwise)
        return best if timed.get(best, float("inf")) < float("inf") else otherwise

    def attempt(self, config: Config) -> float:
        """Check `config`, then time it; infinite if it cannot run or is wrong."""
        if config in self.times:
            return self.times[config]
        from moe_compose.kernels import triton_forward

        def run() -> Tensor:
            return triton_forward.moe_forward(*self.layer, config=config)

        try:
            error = distance(run(), self.exact)
        except Exception as fault:  # whatever a compiler may raise
            log.debug("%s cannot run: %s", config, fault)
            return float("inf")
        if not error <= self.allowed:
            log.warning("%s is wrong by %.1e, and passed over", config, error)
            return float("inf")
        took = seconds(run, self.layer.x_TD.device, repeats=self.repeats)
        self.times[config] = took
        if took < self.seconds:
            self.best, self.seconds, self.error = config, took, error
            self.report(f"{took * 1e6:.0f} µs: {config}")
        return took
