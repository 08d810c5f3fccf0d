"""One tensor of several models: what becomes of the parameters that all experts share.

    weighted         Σ w_i x_i / Σ w_i
    slerp            along the arc between two tensors, seen as vectors (Shoemake 1985)
    task-arithmetic  b + λ Σ w_i d_i, with d_i = x_i − b                     arXiv 2212.04089
    dare             the same of d_i whose entries are dropped with probability 1 − p and else
                     divided by p                                            arXiv 2311.03099
    ties             b + λ Σ w_i d_i / Σ w_i over the d_i that were not trimmed and have the sign
                     that weighs most                                        arXiv 2306.01708

All of it in fp64, rounded once; equal tensors give that tensor, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_compose.errors import OptionError
from moe_compose.surgery.averages import Mean
from moe_compose.surgery.differences import (
    PIECE,
    Dare,
    TaskArithmetic,
    Ties,
    blended,
    empty,
    fill,
    widened,
)
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.transforms import Spec, Transform

if TYPE_CHECKING:
    import torch

KINDS = ("weighted", "slerp", "ties", "dare", "task-arithmetic")

#: Beyond this |cos θ| two tensors are blended along the line: the arc is short, or has no plane.
STRAIGHT = 0.9995


def blend(
    kind: str,
    base: Transform,
    others: Sequence[Transform],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    scale: float = 1.0,
    draw: Draw,
) -> Transform:
    """One tensor out of several of one shape; F32, or F64 where one of them is.

    Args:
        kind: see the module.
        base: b, what differences are taken to; `weighted` and `slerp` take none.
        others: x_i, one per model; exactly two for `slerp`.
        weights: w_i, 0 or more. Only their ratios count, but for `dare` and `task-arithmetic`;
            `slerp` goes `w_1 / (w_0 + w_1)` of the way.
        density: p, the share of each difference that `ties` and `dare` keep.
        scale: λ, the factor on the sum of differences.
        draw: address of `dare`'s masks; the i-th model's is drawn at `{name}, model {i}`.

    Raises:
        OptionError: weights or numbers that cannot be meant, all of them at once.

    Example:
        >>> blend("ties", base, [math, code], [1, 1], density=0.2, draw=Draw(0, name)).spec.dtype
        'F32'
    """
    if problems := list(_problems(kind, others, weights, density, scale)):
        raise OptionError(f"cannot blend {base} like this", problems=problems)
    xs, ws = tuple(others), tuple(map(float, weights))
    if kind in ("weighted", "slerp"):
        total = math.fsum(ws)
        ratios = tuple(w / total for w in ws)
        return Mean(xs, ratios) if kind == "weighted" else Slerp(xs, ratios[1])
    if kind == "ties":
        return Ties(base, xs, ws, scale, density)
    if kind == "dare":
        return Dare(base, xs, ws, scale, density, draw)
    return TaskArithmetic(base, xs, ws, scale)


def _problems(
    kind: str, others: Sequence[Transform], weights: Sequence[float], density: float, scale: float
) -> Iterator[str]:
    if kind not in KINDS:
        yield f"kind ({kind}) must be one of {', '.join(KINDS)}"
    if not others or len(weights) != len(others):
        yield f"there must be one weight per model ({len(weights)} for {len(others)})"
    elif not all(0 <= w < math.inf for w in weights) or not any(weights):
        yield f"weights ({', '.join(f'{w:g}' for w in weights)}) must be 0 or more, and one above 0"
    if kind == "slerp" and len(others) != 2:
        yield f"slerp takes exactly two models ({len(others)})"
    if not 0 < density <= 1:
        yield f"density ({density}) must be above 0 and at most 1"
    if not math.isfinite(scale):
        yield f"scale ({scale}) must be a finite number"


@dataclass(frozen=True)
class Slerp(Transform):
    """`sin((1−t)θ)/sin θ · x_0 + sin(tθ)/sin θ · x_1`, with θ the angle between the two flattened
    tensors; `x_0 + t (x_1 − x_0)` where `|cos θ|` is over `STRAIGHT`, or one of them is zero.
    """

    xs: tuple[Transform, ...]
    t: float

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return self.xs

    @property
    def spec(self) -> Spec:
        return blended(self)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        out = empty(values)
        if out.is_meta:
            return out
        a, b = (v.reshape(-1) for v in values)
        cosine, t = _cosine(a, b), self.t
        if abs(cosine) > STRAIGHT:
            return fill(out, lambda at: widened(a, at).lerp(widened(b, at), t))
        theta = math.acos(cosine)
        of_a, of_b = (math.sin(part * theta) / math.sin(theta) for part in (1 - t, t))
        return fill(out, lambda at: widened(a, at) * of_a + widened(b, at) * of_b)

    def __str__(self) -> str:
        return f"slerp({self.xs[0]}, {self.xs[1]}; {self.t:g})"


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """cos θ; 1 where one of the two is zero. Summed by numpy: one thread, one order."""
    sums: list[list[float]] = [[], [], []]
    for at in range(0, len(a), PIECE):
        x, y = widened(a, at).numpy(), widened(b, at).numpy()
        for found, product in zip(sums, (x * y, x * x, y * y), strict=True):
            found.append(float(product.sum()))
    dot, of_a, of_b = map(math.fsum, sums)
    if not of_a or not of_b:
        return 1.0
    return max(-1.0, min(1.0, dot / (math.sqrt(of_a) * math.sqrt(of_b))))
