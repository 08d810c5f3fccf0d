"""Do sensitivities from statistics tell which experts bear fewer bits?

    OMP_NUM_THREADS=1 python examples/benchmarks/quant_plan.py MOE TEXT

TEXT is a folder of `<domain>/train.txt` and `<domain>/valid.txt`. Experts of MOE, stored one by
one, are rounded to nearest in groups of 32, and dequantised: the least sensitive share to the lower
bits, the others to the higher. Beside each sensitivity stands its reverse and a random choice. KL
to the original, nats per token, on the validation text, of plans that are never written.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import moe_compose as mc
from moe_compose.calibration.data import read_domains
from moe_compose.calibration.quant_options import SENSITIVITIES, QuantPlanOptions
from moe_compose.calibration.quantisation import plan_quantisation
from moe_compose.reporting.contents import contents_of
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.surgery.replace import ChangedWriter

GROUP = 32
Bits = Mapping[tuple[int, int], int]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To nearest, symmetric, a scale for each group."""
    groups, most = weight.float().reshape(-1, GROUP), 2 ** (bits - 1) - 1
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return ((groups / scale).round() * scale).reshape(weight.shape).to(weight.dtype)


def quantised(moe: mc.Checkpoint, bits: Bits) -> Plan:
    """The model with every expert at its bits."""
    writer = ChangedWriter(moe.config)
    for block, experts in contents_of(moe).experts.items():
        layer = int(block.rpartition(".")[2])
        for e, pieces in experts.items():
            names = [p.name for p in pieces.values()]
            writer.add({n: rounded(moe.read(n), bits[layer, e]) for n in names}, {})
    why = Preservation("none", "rounded")
    return mc.replace_tensors(moe, writer.finish(), operation="round", preservation=why)


def bits_of(moe: mc.Checkpoint, stats: mc.ExpertStats, options: QuantPlanOptions) -> Bits:
    plan = plan_quantisation(moe, stats, options)
    return {(x.layer, e): b for x in plan.layers for e, b in enumerate(x.bits)}


def choices(
    moe: mc.Checkpoint, stats: mc.ExpertStats, options: QuantPlanOptions
) -> dict[str, Bits]:
    """Name → bits; all of one budget but the first two."""
    low, high = options.bits_low, options.bits_high
    every = list(bits_of(moe, stats, options))
    found: dict[str, Bits] = {f"all {b}": dict.fromkeys(every, b) for b in (high, low)}
    for name in SENSITIVITIES:
        plan = plan_quantisation(moe, stats, replace(options, sensitivity=name))
        found[name] = {(x.layer, e): b for x in plan.layers for e, b in enumerate(x.bits)}
    worth = {(x.layer, e): w for x in plan.layers for e, w in enumerate(x.sensitivity)}
    count = plan.count(low)
    last = set(sorted(worth, key=lambda k: -worth[k])[:count])
    found["frequency reversed"] = {k: low if k in last else high for k in every}
    for seed in range(3):
        drawn = set(random.Random(seed).sample(every, count))
        found[f"random {seed}"] = {k: low if k in drawn else high for k in every}
    if options.share == 0.5:
        layers = bits_of(moe, stats, replace(options, per="layer"))
        found["whole layers"] = layers
        found["whole layers reversed"] = {k: low + high - b for k, b in layers.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moe", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    train, held = (
        read_domains({p.parent.name: [p] for p in sorted(args.text.glob(f"*/{part}.txt"))})
        for part in ("train", "valid")
    )
    moe = mc.Checkpoint.open(args.moe)
    stats = mc.calibrate(moe, train, mc.CalibrateOptions(tokens=32_768))
    how = mc.EvaluateOptions(tokens=args.tokens, greedy=0)
    print("| bits | share at the lower | choice | KL |\n|---|---|---|---|")
    for low, high, share in ((2, 4, 0.25), (2, 4, 0.5), (3, 4, 0.5), (4, 8, 0.5)):
        options = QuantPlanOptions(bits_low=low, bits_high=high, share=share, group_size=GROUP)
        for name, bits in choices(moe, stats, options).items():
            kl = mc.evaluate(quantised(moe, bits), held, against=moe, options=how).overall.kl
            print(f"| {low}, {high} | {share:g} | {name} | {kl:.5f} |", flush=True)


if __name__ == "__main__":
    main()
