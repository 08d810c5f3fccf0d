"""How fast is one layer of experts? Ours, transformers' `grouped_mm`, Liger's `fused_moe`, and two
dense products of equal FLOPs, beside what the device could do.

    python examples/benchmarks/moe_kernels.py --output result.json > result.md      on a GPU
    python examples/benchmarks/moe_kernels.py --smoke                               anywhere

Four layers × 1, 64, 4096 and 16384 tokens × four measures, bf16, random data: the forward; the
forward with saliency sums (ours only); forward and backward with frozen experts (gradients of x and
of the router's weights); forward and backward with gradients of everything. Times are medians of
graph replays with emptied caches. The floor is the larger of bytes / bandwidth and FLOPs / rate, by
the bandwidth and rate that a copy and a large dense product reach in the same run; each expert that
is chosen is read once. Errors are ‖y − exact‖ / ‖exact‖ against our eager reference, in fp64 up to
64 tokens, else in fp32; of both gradients where experts are frozen. What a line takes more than the
forward is given in % of it: with gradients, that is the backward.

Liger is timed where it can be imported (`pip install --no-deps liger-kernel==0.8.5`). `--smoke`
takes a tiny layer, so that the script itself can be tested; its timings mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from moe_contestants import (
    LAYERS,
    LAYOUT,
    SMALL,
    Forward,
    Layer,
    contestants,
    draw,
    ours,
)

from moe_compose.kernels import ExpertWeights, Saliency, reference
from moe_compose.kernels.selfcheck import distance
from moe_compose.kernels.timing import seconds

MEASURES = ("forward", "saliency", "frozen experts", "all gradients")
PACKAGES = ("moe-compose", "torch", "triton", "transformers", "liger-kernel")


def rates(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """FLOP/s of a dense product of `size` cubed, bytes/s of a copy of 16 · `size`² bytes."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / seconds(lambda: a @ b, device)
    source = torch.randn(2 * size * size, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
    return flops, moved


def floor(measure: str, layer: Layer, args: list[torch.Tensor], rate: tuple[float, float]) -> float:
    """Seconds that the device needs at least."""
    x, gate_up, down, ids, _ = args
    weights = (gate_up.nbytes + down.nbytes) / layer.experts * len(ids.unique())
    flops = 2 * 3 * layer.model * layer.width * ids.numel()
    passes = {"frozen experts": 2, "all gradients": 3}.get(measure, 1)
    moved = passes * (weights + 2 * x.nbytes)  # a gradient of weights is as large as they are
    return max(passes * flops / rate[0], moved / rate[1])


def runner(measure: str, forward: Forward, args: list[torch.Tensor]) -> Callable[[], object]:
    if measure in ("forward", "saliency"):
        return torch.no_grad()(lambda: forward(*args))
    x, gate_up, down, _, gates = args
    wanted = [x, gates] if measure == "frozen experts" else [x, gates, gate_up, down]
    inputs = {id(t): t.detach().requires_grad_() for t in wanted}
    given = [inputs.get(id(t), t) for t in args]
    weight = torch.ones_like(x)
    return lambda: torch.autograd.grad(forward(*given), list(inputs.values()), weight)


def error(measure: str, forward: Forward, args: list[torch.Tensor]) -> float:
    """Of the output; or, with frozen experts, the larger of the two gradients' errors."""
    dtype = torch.float64 if len(args[0]) <= 64 else torch.float32

    def exact(x, gate_up, down, ids, gates):
        weights = ExpertWeights(gate_up=gate_up, down=down)
        return reference.moe_forward(x, weights, LAYOUT, ids, gates, dtype=dtype)

    wide = [args[0].to(dtype), *args[1:]]  # else the exact gradient of x were rounded
    results = runner(measure, forward, args)(), runner(measure, exact, wide)()
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True)
    return max(distance(a, b) for a, b in pairs)


def timed(
    measure: str, name: str, forward: Forward | str, args: list[torch.Tensor], repeats: int
) -> dict[str, object]:
    """Seconds and error, or why there are none."""
    if isinstance(forward, str):
        return {"why not": forward}
    device, found = args[0].device, {}
    try:
        found["seconds"] = seconds(runner(measure, forward, args), device, repeats=repeats)
        if measure != "all gradients" and not name.startswith("dense"):
            found["error"] = error(measure, forward, args)
    except Exception as fault:  # a contestant that fails is a line of the table
        found["why not"] = f"{type(fault).__name__}: {fault}".splitlines()[0][:200]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def measured(
    layers: tuple[Layer, ...], tokens: list[int], device: torch.device, repeats: int
) -> Iterator[dict[str, object]]:
    """One line a layer, number of tokens and measure."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = rates(device, dtype, 8192 if device.type == "cuda" else 128)
    yield {"measure": "rates", "tflops": rate[0] / 1e12, "gb_per_second": rate[1] / 1e9}
    everyone = contestants(device)
    for layer in layers:
        for count in tokens:
            args = draw(layer, count, device, dtype)
            alone: dict[str, float] = {}
            for measure in MEASURES:
                found = everyone
                if measure == "saliency":
                    sums = Saliency.zeros(layer.experts, device)
                    found = {"moe-compose": ours(device, sums)}
                least = floor(measure, layer, args, rate)
                runs = {n: timed(measure, n, f, args, repeats) for n, f in found.items()}
                for name, run in runs.items():
                    if "seconds" in run:
                        alone.setdefault(name, run["seconds"])
                        run["over_forward"] = run["seconds"] / alone[name] - 1
                yield {
                    "measure": measure,
                    "layer": layer.name,
                    "tokens": count,
                    "floor": least,
                    "runs": runs,
                }
                print(f"{layer.name}, {count} tokens, {measure}", file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, object]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    found: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": platform.processor() or platform.machine(),
        "versions": versions,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found["nvidia-smi"] = done.stdout.splitlines()
        except (OSError, subprocess.CalledProcessError) as fault:
            found["nvidia-smi"] = str(fault)
    return found


def cell(run: dict, least: float) -> str:
    if "seconds" not in run:
        return "–"
    more = [f"{run['seconds'] / least:.2f}×"]
    if run["over_forward"]:
        more.append(f"{run['over_forward']:+.1%}")
    if "error" in run:
        more.append(f"{run['error']:.1e}")
    return f"{run['seconds'] * 1e6:.1f} ({', '.join(more)})"


def markdown(facts: dict, lines: list[dict], smoke: bool) -> str:
    """Per measure a table."""
    rate, *rest = lines
    text = [f"# One layer of experts, {facts['device']}, {facts['date']}", ""]
    if smoke:
        text += ["A smoke run: **these timings mean nothing.**", ""]
    text += [", ".join(f"{n} {v}" for n, v in facts["versions"].items()), ""]
    text += [f"    {line}" for line in facts.get("nvidia-smi", [])]
    text += [f"Rates: {rate['tflops']:.3g} TFLOP/s, {rate['gb_per_second']:.4g} GB/s.", ""]
    for measure in MEASURES:
        found = [line for line in rest if line["measure"] == measure]
        names = list(found[0]["runs"])
        text += [f"## {measure}: µs (× floor, over the forward, error)", ""]
        text += ["| layer | tokens | floor | " + " | ".join(names) + " |"]
        text += ["|" + "---|" * (3 + len(names))]
        for line in found:
            cells = [cell(line["runs"][name], line["floor"]) for name in names]
            head = [line["layer"], str(line["tokens"]), f"{line['floor'] * 1e6:.1f}"]
            text += ["| " + " | ".join([*head, *cells]) + " |"]
        text += [""]
    reasons = {
        f"{name}: {run['why not']}"
        for line in rest
        for name, run in line["runs"].items()
        if "why not" in run
    }
    return "\n".join([*text, *(f"- {reason}" for reason in sorted(reasons))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="1,64,4096,16384")
    parser.add_argument("--layer", action="append", help="part of a layer's name; may be repeated")
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--smoke", action="store_true", help="a tiny layer on the CPU")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    device = torch.device("cpu" if args.smoke else args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; --smoke tries its machinery without one")
    layers = SMALL if args.smoke else LAYERS
    if args.layer:
        layers = tuple(x for x in layers if any(w.lower() in x.name.lower() for w in args.layer))
    tokens = [1, 9] if args.smoke else [int(t) for t in args.tokens.split(",")]
    lines = list(measured(layers, tokens, device, 2 if args.smoke else args.repeat))
    facts = machine(device)
    print(markdown(facts, lines, args.smoke))
    if args.output:
        args.output.write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
