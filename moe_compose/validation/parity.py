"""The step-0 receipt: source and result run side by side on real text, and what they disagree by.

Both models are loaded by transformers, in fp32 and in the checkpoint's own dtype, one after the
other; logits wait in a temporary file. fp32 shows whether the mathematics is the same; the
checkpoint's dtype shows what people will run, held to the rounding noise of the source itself.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.architectures.dialects import CONFIG_DTYPES
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.surgery.plan import Preservation
from moe_compose.validation.quiet import quiet_transformers
from moe_compose.validation.report import Agreement, Receipt
from moe_compose.validation.text import Sequences

if TYPE_CHECKING:
    import numpy as np

    Logits = np.memmap[tuple[int, int], np.dtype[np.float32]]

#: Exact class: mean KL in fp32, and slack over the source's own rounding noise in a 16-bit dtype.
EXACT_KL = 1e-9
NOISE_FACTOR = 1.5
TOP1 = 0.995

#: Rows of logits that are compared at a time.
_ROWS = 64


def load(checkpoint: Checkpoint, dtype: str) -> Any:
    """The checkpoint as a transformers model on the CPU, in `dtype` (`float32`, ...), eager
    experts, evaluation mode.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=getattr(torch, dtype),
            experts_implementation="eager",
            local_files_only=True,
        )
    return model.eval()


def main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype most of the bytes have, as torch calls it; `float32` where torch cannot run it."""
    sizes: dict[str, int] = {}
    for t in checkpoint.tensors.values():
        sizes[t.dtype] = sizes.get(t.dtype, 0) + t.nbytes
    return CONFIG_DTYPES.get(max(sizes, key=lambda d: sizes[d]), "float32")


def memory_needed(*checkpoints: Checkpoint) -> int:
    """Bytes that loading the larger of the checkpoints in fp32 takes, with a quarter on top for
    loading and running.
    """
    return max(5 * sum(t.numel for t in c.tensors.values()) for c in checkpoints)


def memory_available() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def compare(
    source: Checkpoint, result: Checkpoint, texts: Sequences, stated: Preservation
) -> Receipt:
    """Run both models over `texts` and hold the result to the class its plan stated.

    Args:
        source: the reference, a local checkpoint.
        result: what is held to it, a local checkpoint.
        texts: token ids, the same for both.
        stated: the plan's preservation class.
    """
    narrow = stated.rounded_to or main_dtype(result)
    with tempfile.TemporaryDirectory() as folder:

        def run(checkpoint: Checkpoint, dtype: str, name: str) -> Logits:
            return run_model(checkpoint, dtype, texts, Path(folder) / name)

        reference = run(source, "float32", "reference")
        agreements = [agree("float32", reference, run(result, "float32", "result"), texts)]
        if narrow != "float32":
            low = run(source, narrow, "low")
            noise = agree(narrow, reference, low, texts)
            measured = agree(narrow, low, run(result, narrow, "result"), texts)
            agreements.append(replace(measured, noise=noise.relative_error, noise_top1=noise.top1))
    met, verdict = judge(agreements, stated)
    return Receipt(
        source.label, texts.name, texts.tokens, tuple(agreements), str(stated), met, verdict
    )


def run_model(checkpoint: Checkpoint, dtype: str, texts: Sequences, file: Path) -> Logits:
    """Logits over all sequences, fp32 `[tokens, vocabulary]`, backed by `file`."""
    import numpy as np
    import torch

    model = load(checkpoint, dtype)
    logits: Logits | None = None
    at = 0
    with torch.inference_mode():
        for ids in texts.ids:
            rows = model(input_ids=ids).logits[0].float().numpy()
            if logits is None:
                shape = (texts.tokens, rows.shape[1])
                logits = np.memmap(file, np.float32, "w+", shape=shape)
            logits[at : at + len(rows)] = rows
            at += len(rows)
    assert logits is not None
    return logits


def agree(dtype: str, reference: Logits, result: Logits, texts: Sequences) -> Agreement:
    """Compare logits, in fp64, a few rows at a time.

    Args:
        dtype: what they were computed in.
        reference: `[tokens, vocabulary]`.
        result: the same.
        texts: the token ids behind the rows, for the losses.
    """
    import torch

    worst = delta = norm = kl = same = loss = reference_loss = 0.0
    rows = predicted = 0
    for ids in texts.ids:
        length = ids.shape[1]
        for start in range(0, length, _ROWS):
            stop = min(start + _ROWS, length)
            ref = torch.from_numpy(reference[rows + start : rows + stop]).double()
            got = torch.from_numpy(result[rows + start : rows + stop]).double()
            worst = max(worst, float((got - ref).abs().max()))
            delta += float((got - ref).square().sum())
            norm += float(ref.square().sum())
            p, q = ref.log_softmax(-1), got.log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            same += float((ref.argmax(-1) == got.argmax(-1)).sum())
            targets = ids[0, start + 1 : stop + 1]
            at = torch.arange(len(targets))
            reference_loss -= float(p[at, targets].sum())
            loss -= float(q[at, targets].sum())
            predicted += len(targets)
        rows += length
    return Agreement(
        dtype=dtype,
        max_error=worst,
        relative_error=math.sqrt(delta / norm) if norm else math.inf,
        kl=kl / rows,
        top1=same / rows,
        loss=loss / max(1, predicted),
        reference_loss=reference_loss / max(1, predicted),
    )


def judge(agreements: Sequence[Agreement], stated: Preservation) -> tuple[bool, str]:
    """Does the measurement meet the stated class? And why, in one sentence.

    Exact: relative error of fp32 logits within the pair's tolerance and KL ≤ 1e-9; in 16 bits,
    within 1.5 times the source's own rounding noise. Weights that had to be rounded (a factor of √2
    in bf16) are held to that noise in fp32 too.
    """
    wide, *rest = agreements
    figures = f"fp32 relative error {wide.relative_error:.1e}, KL {wide.kl:.1e}"
    change = f"loss {wide.reference_loss:.4f} → {wide.loss:.4f}"
    if not all(math.isfinite(a.relative_error) and math.isfinite(a.loss) for a in agreements):
        return False, "logits are not finite"
    if stated.kind == "none":
        return True, f"not meant to preserve the function: {change} nats per token"
    if stated.kind == "approximate":
        met = wide.kl <= stated.tolerance
        return met, f"KL {wide.kl:.1e} against {stated.tolerance:g} nats stated; {change}"
    noise = rest[0].noise if rest else None
    if stated.rounded_to and noise is not None:
        met = wide.relative_error <= NOISE_FACTOR * noise
        limit = f"{NOISE_FACTOR} × the source's {stated.rounded_to} noise ({noise:.1e})"
    else:
        met = wide.relative_error <= stated.tolerance and wide.kl <= EXACT_KL * max(
            1.0, stated.tolerance / 1e-6
        )
        limit = f"{stated.tolerance:.0e}"
    for a in rest:
        if a.noise is not None and a.noise_top1 is not None:
            near = a.relative_error <= NOISE_FACTOR * a.noise
            met = met and near and a.top1 >= min(TOP1, 2 * a.noise_top1 - 1)
            figures += f"; {a.dtype} {a.relative_error:.1e} (own noise {a.noise:.1e})"
    return met, f"{figures}; limit {limit}; {change}"
