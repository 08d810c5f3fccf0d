"""One pass over all values, a piece at a time: nothing NaN, nothing infinite, nothing left at its
initial value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import TORCH_DTYPES, TensorSource
from moe_compose.validation.report import Check
from moe_compose.validation.structure import capped

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of a tensor; NaN when any value is."""

    low: float
    high: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def constant(self) -> bool:
        return self.low == self.high


def value_range(source: TensorSource, name: str) -> Range | None:
    """The range of a tensor's values, in one streamed pass; None for values torch cannot hold, or
    no values.
    """
    if source.tensors[name].dtype not in TORCH_DTYPES or not source.tensors[name].numel:
        return None
    bounds = [_bounds(piece) for piece in source.stream(name) if piece.numel()]
    lows, highs = zip(*bounds, strict=True)
    if any(math.isnan(x) for x in lows):
        return Range(math.nan, math.nan)
    return Range(min(lows), max(highs))


def _bounds(piece: torch.Tensor) -> tuple[float, float]:
    if piece.element_size() == 1 or piece.is_complex():
        piece = piece.real.float() if piece.is_complex() else piece.float()
    low, high = piece.aminmax()
    return float(low), float(high)


def check_values(
    checkpoint: TensorSource, constants: Sequence[str], reference: TensorSource | None
) -> Check:
    """No NaN or infinity; no tensor constant unless it was made so, or was so in the source.

    A class initialises norms to ones and biases to zeros, and a loader leaves a tensor so when it
    did not find it; a weight of zeros is an expert or a router that does nothing.

    Args:
        checkpoint: whose values are read.
        constants: name patterns (`*` for numbers) of tensors that are constant on purpose.
        reference: the source; a tensor that is constant there, too, is no finding.
    """
    meant = [re.compile(re.escape(p).replace(r"\*", r"\d+")) for p in constants]
    with ThreadPoolExecutor(2) as pool:
        ranges = dict(
            zip(
                checkpoint.tensors,
                pool.map(lambda n: value_range(checkpoint, n), checkpoint.tensors),
                strict=True,
            )
        )
    bad = [f"{n} holds NaN or infinite values" for n, r in ranges.items() if r and not r.finite]
    suspicious = [
        f"{n} is {r.low:g} throughout"
        for n, r in ranges.items()
        if r
        and r.constant
        and checkpoint.tensors[n].numel > 1
        and not any(p.fullmatch(n) for p in meant)
        and not _constant_in(reference, n)
    ]
    silent = [s for s in suspicious if _is_matrix(checkpoint, s.split(" ", 1)[0])]
    if bad or silent:
        return Check(
            "values", "fail", f"{len(bad + silent)} tensors are wrong", capped(bad + silent)
        )
    if suspicious:
        text = f"finite; {len(suspicious)} look freshly initialised"
        return Check("values", "warn", text, capped(suspicious))
    return Check(
        "values", "pass", f"finite, and none left at its initial value ({len(ranges)} read)"
    )


def _constant_in(reference: TensorSource | None, name: str) -> bool:
    if reference is None or name not in reference.tensors:
        return False
    found = value_range(reference, name)
    return found is not None and found.constant


def _is_matrix(source: TensorSource, name: str) -> bool:
    return sum(d > 1 for d in source.tensors[name].shape) >= 2
