"""Memory and time on a checkpoint larger than memory: calibrate, then prune against `cp`.

Makes a random Qwen3-MoE of `--size` GB in bf16 (64 experts of width 768, hidden 2048: 0.6 GB a
layer), runs the command line on it, and deletes all it made. Memory is polled from
/proc/PID/status: RssAnon and RssShmem (weights lie in anonymous maps, which the kernel counts as
shared) are what the process holds; VmHWM also counts pages of mapped files, which the system takes
back when it needs them. Prune is timed with `--no-validate`, against `cp -r` of
what it wrote, each ending with sync, in both orders.

    OMP_NUM_THREADS=1 python examples/benchmarks/large_checkpoint.py --folder /tmp/large --size 20
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from random_moe import make_moe

SHAPE = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip

#: Bytes of a layer of that shape.
LAYER = 2 * (64 * (3 * 768 * 2048 + 2048) + 2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128)
GIB = 1 << 30


def watched(command: Sequence[str]) -> tuple[float, float, float]:
    """Seconds of a command and a sync after it; peak of what it held, and was resident, GiB."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    held = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        lines = dict(line.split(":", 1) for line in status.splitlines())
        kib = {n: int(lines.get(n, "0").split()[0]) for n in ("RssAnon", "RssShmem", "VmHWM")}
        held = max(held, kib["RssAnon"] + kib["RssShmem"])
        resident = max(resident, kib["VmHWM"])
        time.sleep(0.02)
    if process.wait():
        raise SystemExit((process.stderr.read() if process.stderr else b"").decode()[-2000:])
    os.sync()
    seconds = time.perf_counter() - start
    return seconds, held / (1 << 20), resident / (1 << 20)


def say(name: str, found: tuple[float, float, float]) -> None:
    """A row of the table."""
    print(f"| {name} | {found[0]:.1f} | {found[1]:.2f} | {found[2]:.2f} |", flush=True)


def tool(*words: str | Path) -> list[str]:
    """A command line of this package."""
    return [sys.executable, "-m", "moe_compose_cli", *map(str, words), "--quiet"]


def calibrate(folder: Path, tokens: int, dtype: str) -> tuple[float, float, float]:
    """Measure few tokens: what is held is the layer, not the text."""
    text = folder / "text.txt"
    text.write_text("Once upon a time there was a little dog who liked to play. " * tokens)
    words = ("--tokens", str(tokens), "--seq-len", "256", "--batch", "2", "--dtype", dtype)
    where = ("--data", text, "--overwrite", "--device", "cpu")
    return watched(tool("calibrate", folder / "moe", folder / "stats", *where, *words))


def prune_and_copy(folder: Path) -> None:
    """Prune then `cp`, and the other way round; half of the experts go, by lot."""
    out, copy = folder / "pruned", folder / "copy"
    words = ("--criterion", "random", "--ratio", "0.5", "--no-validate")
    prune = tool("prune", folder / "moe", out, *words)
    cp = ["cp", "-r", "--reflink=never", str(out), str(copy)]
    first = watched(prune)
    say("prune, then", first)
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    one = watched(cp)
    say(f"cp of its {written / 1e9:.1f} GB", one)
    shutil.rmtree(copy)
    other = watched(cp)
    say("cp, then", other)
    shutil.rmtree(copy)
    shutil.rmtree(out)
    second = watched(prune)
    say("prune", second)
    print(f"\nprune / cp: {first[0] / one[0]:.2f} and {second[0] / other[0]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; is deleted")
    parser.add_argument("--size", type=float, default=20, help="GB of the checkpoint")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--calibrate-only", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        layers = max(1, round(args.size * 1e9 / LAYER))
        made = make_moe(args.folder / "moe", num_hidden_layers=layers, **SHAPE)
        print(f"{made / 1e9:.1f} GB, {layers} layers of {LAYER / GIB:.2f} GiB in bf16\n")
        print("| | seconds | held, GiB | resident, GiB |\n|---|---|---|---|", flush=True)
        for dtype in args.dtype:
            say(f"calibrate, {dtype}", calibrate(args.folder, args.tokens, dtype))
        if not args.calibrate_only:
            prune_and_copy(args.folder)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
