"""What can be asked of `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from moe_compose.errors import OptionError

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateOptions:
    """Options of `calibrate`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        tokens: Tokens in all, spread evenly over the domains.
        seq_len: Longest sequence, in tokens; longer documents are cut, and no sequence exceeds the
            model's own context.
        batch: Sequences that run together.
        seed: Seed of the draw of documents and sequences.
        device: Where to compute: cpu, cuda, cuda:1; by default cuda if there is one.
        dtype: What to compute in: float32, bfloat16, float16 or float64; by default float32 on the
            CPU and the checkpoint's own dtype elsewhere.
        similarity: Also gather what merging needs, on a sample of tokens: how alike experts are,
            and their hidden activations. Takes disk; the size is shown.
        sample: Tokens of that sample.
        loo_tokens: Also mask each expert in turn on so many tokens, such as 2048, which criteria
            loo-mse and (up to 64 experts a layer) naee-greedy of prune need; 0: do not.
    """

    tokens: int = 131_072
    seq_len: int = 1024
    batch: int = 8
    seed: int = 0
    device: str | None = None
    dtype: Dtype | None = None
    similarity: bool = False
    sample: int = 256
    loo_tokens: int = 0

    def check(self) -> CalibrateOptions:
        """Raise every fault together; returns the options.

        Raises:
            OptionError: at least one cannot be meant.
        """
        problems = list(self._problems())
        if problems:
            raise OptionError("these options cannot be meant", problems=problems)
        return self

    def _problems(self) -> Iterator[str]:
        least_of = {"tokens": 2, "seq_len": 2, "batch": 1, "sample": 2, "loo_tokens": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value < least:
                yield f"{name} ({value}) must be at least {least}"
        if self.dtype not in (None, *get_args(Dtype)):
            yield f"dtype ({self.dtype}) must be one of {', '.join(get_args(Dtype))}"
        if self.similarity and self.sample > self.tokens:
            yield f"sample ({self.sample}) must be at most tokens ({self.tokens})"
        if self.loo_tokens > self.tokens:
            yield f"loo_tokens ({self.loo_tokens}) must be at most tokens ({self.tokens})"
