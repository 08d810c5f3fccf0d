"""Memory and time on a checkpoint larger than memory: calibrate, prune against `cp`, validate.

Makes a random Qwen3-MoE of `--size` GB in bf16 (64 experts of width 768, hidden 2048: 0.6 GB a
layer), runs the command line on it, and deletes all it made. Memory is polled from
/proc/PID/status: RssAnon and RssShmem (weights lie in anonymous maps, which the kernel counts as
shared) are what the process holds; VmHWM also counts pages of mapped files, which the system takes
back when it needs them. Processes that a command starts count with it. Prune is timed with
`--no-validate`, against `cp -r` of what it wrote, each ending with sync, in both orders, with what
they read evicted from the page cache before and with what is left there.

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
        now = [kib_of(pid) for pid in family_of(process.pid)]
        held = max(held, sum(kib["RssAnon"] + kib["RssShmem"] for kib in now))
        resident = max(resident, sum(kib["VmRSS"] for kib in now))
        time.sleep(0.02)
    if process.wait():
        raise SystemExit((process.stderr.read() if process.stderr else b"").decode()[-2000:])
    os.sync()
    seconds = time.perf_counter() - start
    return seconds, held / (1 << 20), resident / (1 << 20)


def family_of(pid: int) -> list[int]:
    """A process and those that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in family_of(int(child)))]


def kib_of(pid: int) -> dict[str, int]:
    """What a process has in memory, KiB; nothing once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        status = ""
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {n: int(lines.get(n, "0").split()[0]) for n in ("RssAnon", "RssShmem", "VmRSS")}


def evict(folder: Path) -> None:
    """Have the system forget what it holds of a folder's files."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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


def prune_and_copy(folder: Path, *, cold: bool) -> None:
    """Prune then `cp`, and the other way round; half of the experts go, by lot.

    Args:
        folder: holds the checkpoint.
        cold: evict what each of them reads first.
    """
    out, copy = folder / "pruned", folder / "copy"
    words = ("--criterion", "random", "--ratio", "0.5", "--no-validate")
    prune = tool("prune", folder / "moe", out, *words)
    cp = ["cp", "-r", "--reflink=never", str(out), str(copy)]
    forget, how = (evict, "cold") if cold else (lambda _: None, "warm")
    forget(folder / "moe")
    first = watched(prune)
    say(f"prune, {how}, then", first)
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    forget(out)
    one = watched(cp)
    say(f"cp of its {written / 1e9:.1f} GB", one)
    shutil.rmtree(copy)
    forget(out)
    other = watched(cp)
    say("cp, then", other)
    shutil.rmtree(copy)
    shutil.rmtree(out)
    forget(folder / "moe")
    second = watched(prune)
    say("prune", second)
    shutil.rmtree(out)
    print(f"\nprune / cp: {first[0] / one[0]:.2f} and {second[0] / other[0]:.2f}", flush=True)


def validate(folder: Path, keep: int) -> None:
    """Prune, and validate what was written against what it was made from."""
    out = folder / "pruned"
    words = ("--criterion", "random", "--keep", str(keep), "--no-validate")
    say(f"prune to {keep}", watched(tool("prune", folder / "moe", out, *words)))
    say("validate it", watched(tool("validate", out, "--against", folder / "moe")))
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; is deleted")
    parser.add_argument("--size", type=float, default=20, help="GB of the checkpoint")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--validate", type=int, metavar="KEEP", help="also validate, of 64 experts")
    parser.add_argument("--no-cp", action="store_true", help="do not time prune against cp")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        layers = max(1, round(args.size * 1e9 / LAYER))
        made = make_moe(args.folder / "moe", num_hidden_layers=layers, **SHAPE)
        print(f"{made / 1e9:.1f} GB, {layers} layers of {LAYER / GIB:.2f} GiB in bf16\n")
        print("| | seconds | held, GiB | resident, GiB |\n|---|---|---|---|", flush=True)
        for dtype in args.dtype:
            say(f"calibrate, {dtype}", calibrate(args.folder, args.tokens, dtype))
        if args.validate:
            validate(args.folder, args.validate)
        for cold in () if args.no_cp else (False, True):
            prune_and_copy(args.folder, cold=cold)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
