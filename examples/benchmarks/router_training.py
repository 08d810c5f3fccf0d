"""Does training routers bring back what pruning lost, and what does it cost beside training all?

    OMP_NUM_THREADS=1 python examples/benchmarks/router_training.py recover MOE TEXT --keep 8
    OMP_NUM_THREADS=1 python examples/benchmarks/router_training.py recover ... --objective layer
    OMP_NUM_THREADS=1 python examples/benchmarks/router_training.py cost MOE TEXT

TEXT is a folder of `<domain>/train.txt` and `<domain>/valid.txt`. `recover` prunes by REAP on the
training text, distils the routers from the original on it, and evaluates on the validation text,
which neither has seen. `cost` trains routers only and everything on the same batches, in processes
of their own, alternately: seconds a step, and the memory that a step takes beside the weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import moe_compose as mc
from moe_compose.calibration.data import Domain, read_domains
from moe_compose.training import TrainOptions, train_router


def texts_of(folder: Path, part: str) -> tuple[Domain, ...]:
    """Every domain's text."""
    return read_domains({p.parent.name: [p] for p in sorted(folder.glob(f"*/{part}.txt"))})


def recover(args: argparse.Namespace) -> None:
    """Print KL and loss before and after."""
    moe, train = mc.Checkpoint.open(args.moe), texts_of(args.text, "train")
    held = texts_of(args.text, "valid")
    stats = mc.calibrate(moe, train, mc.CalibrateOptions(device=args.device))
    small = mc.prune(moe, stats, mc.PruneOptions(keep=args.keep))
    if args.refit:
        small = mc.refit(small, moe, train)
    options = TrainOptions(
        **{"objective": args.objective, "train": args.train, "device": args.device},
        **{"steps": args.steps, "lr": args.lr},
    )
    begun = time.perf_counter()
    better = train_router(small, train, options, teacher=moe)
    seconds = time.perf_counter() - begun
    report = better.reports["training.json"]
    for name in ("start", "best", "stopped", "tokens_per_second", "layers"):
        print(name, report.get(name))
    how = mc.EvaluateOptions(tokens=args.tokens, greedy=0)
    print("| | loss | KL | top-1 |\n|---|---|---|---|")
    found = [mc.evaluate(x, held, against=moe, options=how).overall for x in (small, better)]
    names = (f"pruned to {args.keep}", f"{args.train} trained ({args.objective})")
    for name, score in zip(names, found, strict=True):
        print(f"| {name} | {score.loss:.4f} | {score.kl:.4f} | {score.top1:.2%} |")
    print(f"KL recovered: {1 - found[1].kl / found[0].kl:.1%}; {seconds:.0f} s", flush=True)


def one_cost(args: argparse.Namespace) -> None:
    """In a process of its own: seconds of each step, and memory."""
    moe, train = mc.Checkpoint.open(args.moe), texts_of(args.text, "train")
    seconds: list[float] = []
    memory = Memory()

    def tell(progress: object) -> None:
        seconds.append(time.perf_counter())
        if len(seconds) == 1:  # the evaluation before any step
            memory.begin()

    options = TrainOptions(
        **{"train": args.train, "steps": args.steps, "eval_every": 10**6, "eval_tokens": 512},
        **{"batch": 8, "batch_tokens": 4096, "device": args.device, "balance": "none"},
    )
    train_router(moe, train, options, progress=tell)
    steps = [b - a for a, b in itertools.pairwise(seconds)][2 : args.steps]
    print(json.dumps({"step": statistics.median(steps), "bytes": memory.end()}))


class Memory:
    """The largest resident size, sampled, over that at the beginning; on a GPU, of what is
    allocated.
    """

    def begin(self) -> None:
        """From here on."""
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._start = self._now()
        self._most, self._done = self._start, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> int:
        """The most beyond the beginning."""
        self._done.set()
        self._thread.join()
        most = torch.cuda.max_memory_allocated() if self._cuda else self._most
        return most - self._start

    def _now(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._now())


def cost(args: argparse.Namespace) -> None:
    """Print a row for each way."""
    runs: dict[str, list[dict[str, float]]] = {"router": [], "all": []}
    for _ in range(args.repeat):
        for train, found in runs.items():
            words = [sys.executable, __file__, "one-cost", args.moe, args.text, "--train", train]
            words += ["--steps", args.steps, "--device", args.device]
            done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print("| trains | s a step | memory of a step, MB |\n|---|---|---|")
    medians = {
        t: [statistics.median(r[k] for r in f) for k in ("step", "bytes")] for t, f in runs.items()
    }
    for train, (seconds, size) in medians.items():
        print(f"| {train} | {seconds:.3f} | {size / 1e6:.0f} |")
    print("router / all:", *(f"{a / b:.2f}" for a, b in zip(*medians.values(), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("recover", "cost", "one-cost"))
    parser.add_argument("moe", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--train", default="router")
    parser.add_argument("--objective", default="distill", choices=("distill", "layer"))
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.steps = args.steps or (300 if args.what == "recover" else 8)
    torch.set_num_threads(1)
    {"recover": recover, "cost": cost, "one-cost": one_cost}[args.what](args)


if __name__ == "__main__":
    main()
