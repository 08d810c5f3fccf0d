"""What can be asked of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import OptionError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """How much text, and how it is run.

    Attributes:
        tokens: Tokens to evaluate on, in all; every domain gives the same share.
        seq_len: Longest sequence, in tokens.
        batch: Sequences that run together.
        greedy: Tokens that both models decode greedily from a prompt of each domain (with
            --against), a pass through the reference each; by default 16, or 0 above 4 GiB.
        dtype: Compute in float32, bfloat16, float16 or float64.
        device: Where to compute: cpu, cuda, cuda:1.
        seed: Seed of the draw of documents.
    """

    tokens: int = 16_384
    seq_len: int = 512
    batch: int = 8
    greedy: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise OptionError("this evaluation cannot be meant", problems=problems)

    def _problems(self) -> Iterator[str]:
        for name, least in (("tokens", 2), ("seq_len", 2), ("batch", 1), ("greedy", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} ({value}) must be at least {least}"
        if self.dtype not in FLOAT_DTYPES.values():
            yield f"dtype ({self.dtype}) is none of {', '.join(FLOAT_DTYPES.values())}"
