"""What can be asked of `refit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import OptionError


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitOptions:
    """Options of `refit`.

    Attributes:
        tokens: Tokens in all, spread evenly over the domains; an expert is refitted if at least as
            many as it is wide are sent to it.
        seq_len: Longest sequence, in tokens.
        batch: Sequences that run together.
        seed: Seed of the draw of documents and sequences.
        ridge: λ of the least squares, as a share of the mean diagonal of PᵀP.
        sweeps: How often the experts are refitted in turn, each to what the others leave.
        held_out: One sequence in so many is not fitted to; a layer is changed only if its error
            falls on these.
        device: Where to compute: cpu, cuda, cuda:1.
        dtype: What the models compute in; systems are solved in float64.
    """

    tokens: int = 131_072
    seq_len: int = 1024
    batch: int = 8
    seed: int = 0
    ridge: float = 0.03
    sweeps: int = 2
    held_out: int = 8
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise OptionError("this refit cannot be meant", problems=problems)

    def _problems(self) -> Iterator[str]:
        least = (("tokens", 2), ("seq_len", 2), ("batch", 1), ("sweeps", 1), ("held_out", 2))
        for name, lowest in least:
            if getattr(self, name) < lowest:
                yield f"{name} ({getattr(self, name)}) must be at least {lowest}"
        if not 0 < self.ridge < float("inf"):
            yield f"ridge ({self.ridge}) must be above 0"
        if self.dtype not in FLOAT_DTYPES.values():
            yield f"dtype ({self.dtype}) is none of {', '.join(FLOAT_DTYPES.values())}"
