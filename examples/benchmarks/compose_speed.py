"""How fast and how large is composing? Against `cp` + sync of the same bytes, and against
mergekit-moe on the same job.

Makes four random dense Llamas of 2 GB in bf16 and composes them through the command line with
shared parameters of the base and averaged (validation off: this times surgery), copies the result
with `cp` and sync, and, where an environment with mergekit is given, lets mergekit-moe compose the
same four with the base's shared parameters. Peak memory is the kernel's own figure for the process
(`ru_maxrss`). Every contestant runs `--repeat` times, in turn; all times are printed.

    python examples/benchmarks/compose_speed.py --folder /tmp/bench --mergekit /path/to/venv
    --output result.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from upcycle_speed import make_dense

from moe_compose.checkpoint.header import header_length

#: Half of a source are embedding and head, as in models of 1 B parameters.
MODELS = {
    "2GB": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 4096,
        "num_hidden_layers": 12,
    },
    "small": {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    },
}  # fmt: skip
NAMES = ("one", "two", "three", "four")


def make_relative(dense: Path, folder: Path, seed: int) -> None:
    """A model like `dense` whose every weight differs in its last bits."""
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file, relative = (f / "model.safetensors" for f in (dense, folder))
    with file.open("rb") as original, relative.open("wb") as copy:
        first = original.read(8)
        copy.write(first)
        copy.write(original.read(header_length(first, file.stat().st_size, file.name)))
        while piece := original.read(1 << 24):
            copy.write((np.frombuffer(piece, np.uint16) ^ seed).tobytes())


def make_sources(folder: Path, shape: dict[str, int], distinct: int) -> int:
    """The four models, some of them links to others; returns the bytes of one."""
    size = make_dense(folder / NAMES[0], shape)
    for seed, name in enumerate(NAMES[1:], 1):
        if seed < distinct:
            make_relative(folder / NAMES[0], folder / name, seed)
        else:
            shutil.copytree(folder / NAMES[seed % distinct], folder / name, copy_function=os.link)
    return size


def timed(command: list[str]) -> dict[str, float]:
    """A command followed by sync: wall seconds, seconds on a core, peak memory, load before."""
    os.sync()
    load, start = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "load": round(load, 1),
    }


def compose(folder: Path, shared: str) -> list[str]:
    """The command line that composes the four."""
    base, *others = NAMES
    experts = [word for name in others for word in ("--expert", f"{name}={folder / name}")]
    return [
        sys.executable, "-m", "moe_compose_cli", "compose", str(folder / "moe"), "--base",
        str(folder / base), *experts, "--shared", shared, "--router", "random", "--no-validate",
        "--overwrite", "--quiet",
    ]  # fmt: skip


def contestants(folder: Path, mergekit: Path | None) -> dict[str, list[str]]:
    """Name → command; `cp` copies what the one before it wrote."""
    moe, copy = str(folder / "moe"), str(folder / "copy")
    commands = {f"compose, shared={s}": compose(folder, s) for s in ("mean", "base")}
    commands["cp"] = ["cp", "-r", "--reflink=never", moe, copy]
    if mergekit is not None:
        recipe = folder / "mergekit.yml"
        experts = [{"source_model": str(folder / n), "positive_prompts": [n]} for n in NAMES]
        config = {"base_model": str(folder / NAMES[0]), "gate_mode": "random", "experts": experts}
        recipe.write_text(json.dumps({**config, "dtype": "bfloat16"}))
        commands["mergekit-moe"] = [str(mergekit / "bin/mergekit-moe"), str(recipe), copy]
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="empty folder with enough disk")
    parser.add_argument("--size", choices=list(MODELS), default="2GB")
    parser.add_argument("--distinct", type=int, default=4, help="sources that are no hard links")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    source_bytes = make_sources(args.folder, MODELS[args.size], args.distinct)
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeat):
        for name, command in contestants(args.folder, args.mergekit).items():
            shutil.rmtree(args.folder / "copy", ignore_errors=True)
            runs.setdefault(name, []).append(timed(command))
            print(name, runs[name][-1], flush=True)
    best = {name: min(run["seconds"] for run in found) for name, found in runs.items()}
    result = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "source_bytes": source_bytes,
        "moe_bytes": sum(p.stat().st_size for p in (args.folder / "moe").glob("*.safetensors")),
        "runs": runs,
        "best_seconds": best,
        "ratio_to_cp": {n: round(s / best["cp"], 2) for n, s in best.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
