"""One pass over all values, a piece at a time: nothing NaN, nothing infinite, nothing left at its
initial value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
    """Smallest and largest value; dtypes that torch cannot compare are widened first."""
    import torch

    if piece.is_complex():
        piece = torch.view_as_real(piece)
    elif piece.is_floating_point() and piece.element_size() == 1:
        piece = piece.float()
    elif piece.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool):
        piece = piece.double()
    low, high = piece.aminmax()
    return float(low), float(high)


def compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Name patterns with `*` for every number."""
    return [re.compile(re.escape(p).replace(r"\*", r"\d+")) for p in patterns]


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
    meant = compiled(constants)
    with ThreadPoolExecutor(2) as pool:
        ranges = dict(
            zip(
                checkpoint.tensors,
                pool.map(lambda n: value_range(checkpoint, n), checkpoint.tensors),
                strict=True,
            )
        )
    bad = [n for n, r in ranges.items() if r and not r.finite]
    same = {
        n: r.low
        for n, r in ranges.items()
        if r and r.constant and checkpoint.tensors[n].numel > 1 and not _meant(n, meant, reference)
    }
    silent = [n for n in same if _is_matrix(checkpoint, n)]
    suspicious = [f"{n} is {value:g} throughout" for n, value in same.items()]
    wrong = [f"{n} holds NaN or infinite values" for n in bad]
    wrong += [f"{n} is {same[n]:g} throughout" for n in silent]
    if wrong:
        return Check("values", "fail", f"{len(wrong)} tensors are wrong", capped(wrong))
    if suspicious:
        text = f"finite; {len(suspicious)} look freshly initialised"
        return Check("values", "warn", text, capped(suspicious))
    return Check(
        "values", "pass", f"finite, and none left at its initial value ({len(ranges)} read)"
    )


def _meant(name: str, patterns: Sequence[re.Pattern[str]], reference: TensorSource | None) -> bool:
    """Made constant on purpose, or constant in the source already."""
    if any(p.fullmatch(name) for p in patterns):
        return True
    if reference is None or name not in reference.tensors:
        return False
    found = value_range(reference, name)
    return found is not None and found.constant


def check_copied(
    checkpoint: TensorSource, patterns: Sequence[str], reference: TensorSource
) -> Check:
    """Tensors that surgery copied are still the source's, bit for bit.

    Args:
        checkpoint: the result.
        patterns: names (`*` for numbers) of what was copied.
        reference: the source.
    """
    meant = compiled(patterns)
    names = [n for n in checkpoint.tensors if any(p.fullmatch(n) for p in meant)]
    problems = [n for n in names if not _equal(checkpoint, reference, n)]
    if problems:
        text = f"{len(problems)} of {len(names)} copied tensors differ from the source's"
        return Check("copies", "fail", text, capped(problems))
    return Check("copies", "pass", f"{len(names)} tensors are the source's, bit for bit")


def check_ties(checkpoint: TensorSource, tied: Mapping[str, str]) -> list[Check]:
    """Tensors that the config ties, and that are both on disk, are equal; nothing without any.

    Where they differ transformers 5 does not tie them, and every other engine drops the first.

    Args:
        checkpoint: whose values are read.
        tied: name → the name that it is tied to.
    """
    tensors = checkpoint.tensors
    pairs = [(a, b) for a, b in tied.items() if a in tensors and b in tensors]
    problems = [f"{a} is not {b}" for a, b in pairs if not _equal(checkpoint, checkpoint, a, b)]
    if problems:
        text = "the config ties tensors that differ: engines take one for both"
        return [Check("ties", "fail", text, capped(problems))]
    return [Check("ties", "pass", f"{len(pairs)} tied tensors are equal")] if pairs else []


def _equal(one: TensorSource, other: TensorSource, name: str, called: str = "") -> bool:
    """Whether a tensor has the same bits in both, where the other may call it something else."""
    called = called or name
    a, b = one.tensors[name], other.tensors.get(called)
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.dtype not in TORCH_DTYPES:
        return True
    pairs = zip(one.stream(name), other.stream(called), strict=True)
    return all(bool((_bits(x) == _bits(y)).all()) for x, y in pairs)


def _bits(piece: torch.Tensor) -> torch.Tensor:
    import torch

    return piece.contiguous().view(torch.uint8)


def _is_matrix(source: TensorSource, name: str) -> bool:
    return sum(d > 1 for d in source.tensors[name].shape) >= 2
