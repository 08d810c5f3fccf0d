"""What can be asked of routers that are made from text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import OptionError

#: How a row follows from an expert's text.
Method = Literal["ridge", "hidden"]

#: Starts of a router's rows that look at no text.
_BLIND = ("trained", "copy", "keep", "domain", "random", "zeros")


def idle_text(texts: Mapping[str, Any] | None, router: str) -> list[str]:
    """What is the matter with text that nothing would read."""
    if not texts or router not in _BLIND:
        return []
    names = ", ".join(texts)
    return [
        f"text of {names} has no use with router = {router}, which looks at none: say --router "
        "ridge for rows that follow from it, or leave it out"
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingOptions:
    """Options of router rows that are made from text.

    Attributes:
        method: How rows follow from text: ridge (least squares that tell the experts' texts apart)
            or hidden (the mean of what the router is given).
        tokens: Tokens of each expert's text.
        seq_len: Longest sequence, in tokens.
        batch: Sequences that run together.
        seed: Seed of the draw of documents and sequences.
        ridge: λ of the least squares, as a share of the mean diagonal of XᵀX.
        row_scale: Length of every row; by default the one with the lowest held-out loss.
        tolerance: Nats that the loss of the other domains may rise by when an expert is added.
        held_out: One sequence in so many is kept for the search of the scale.
        device: Where to compute: cpu, cuda, cuda:1.
        dtype: What the model computes in; sums and systems are float64.
    """

    method: Method = "ridge"
    tokens: int = 65_536
    seq_len: int = 512
    batch: int = 8
    seed: int = 0
    ridge: float = 0.01
    row_scale: float | None = None
    tolerance: float = 0.02
    held_out: int = 8
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise OptionError("these routers cannot be meant", problems=problems)

    def _problems(self) -> Iterator[str]:
        for name, lowest in (("tokens", 2), ("seq_len", 2), ("batch", 1), ("held_out", 2)):
            if getattr(self, name) < lowest:
                yield f"{name} ({getattr(self, name)}) must be at least {lowest}"
        for name in ("ridge", "row_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name} ({value}) must be above 0"
        if not 0 <= self.tolerance < math.inf:
            yield f"tolerance ({self.tolerance}) must be at least 0"
        if self.method not in get_args(Method):
            yield f"method ({self.method}) is none of {', '.join(get_args(Method))}"
        if self.dtype not in FLOAT_DTYPES.values():
            yield f"dtype ({self.dtype}) is none of {', '.join(FLOAT_DTYPES.values())}"
