"""What does measuring cost? The same tokens streamed through a model plainly, and calibrated.

Both runs build the model, read every layer, and end after the last one; they alternate, and the
medians of `--repeat` are compared, of wall time and of processor time (other work on the machine
disturbs the second less). One thread, fp32.

    OMP_NUM_THREADS=1 python examples/benchmarks/calibration_cost.py --random
    OMP_NUM_THREADS=1 python examples/benchmarks/calibration_cost.py MOE_FOLDER

`--random` makes 4 layers of 64 experts (8 chosen, D = 1024, F = 512) in a temporary folder.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_moe import make_moe

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.runtime import Runner


def draw(tokens: int, seq_len: int, vocabulary: int) -> TokenSet:
    """Random ids in two domains."""
    generator = random.Random(0)
    rows = [
        [generator.randrange(3, vocabulary) for _ in range(seq_len)]
        for _ in range(max(2, tokens // seq_len))
    ]
    return TokenSet.of_ids({"a": rows[::2], "b": rows[1::2]})


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(folder: Path, tokens: int, seq_len: int, batch: int, repeat: int) -> None:
    """Print a row of the table."""
    source = mc.Checkpoint.open(folder)
    text = draw(tokens, seq_len, min(source.config["vocab_size"], 2000))
    options = mc.CalibrateOptions(batch=batch, device="cpu", dtype="float32")
    batches = [rows.batch for rows in text.batches(batch)]

    def plain() -> None:
        Runner(source, dtype="float32").run(batches)

    def calibrate() -> None:
        mc.calibrate(source, text, options)

    calibrate()  # files come into the page cache, and code is loaded
    runs = [(timed(plain), timed(calibrate)) for _ in range(repeat)]
    print("| tokens | batch | | plain, s | calibrate, s | more |\n|---|---|---|---|---|---|")
    for i, clock in enumerate(("wall", "processor")):
        p, c = (statistics.median(run[k][i] for run in runs) for k in (0, 1))
        size = f"{sum(text.tokens.values())} | {batch} × {seq_len}"
        print(f"| {size} | {clock} | {p:.2f} | {c:.2f} | {c / p - 1:+.1%} |")
    print("all runs:", [[round(r[k][0], 2) for r in runs] for k in (0, 1)], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a mixture of experts")
    parser.add_argument("--random", action="store_true", help="make one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.random == (args.folder is not None):
        parser.error("give a folder, or --random")
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made) / "moe"
        if args.random:
            make_moe(folder)
        compare(folder, args.tokens, args.seq_len, args.batch, args.repeat)


if __name__ == "__main__":
    main()
