"""What can be asked of `sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_compose.errors import OptionError
from moe_compose.surgery.prune_options import CRITERIA, Criterion

#: Always measured beside the others.
BASELINE: Criterion = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """Options of `sweep`.

    Attributes:
        ratios: Fractions of the experts to remove.
        criteria: What makes an expert worth keeping, as in `prune`; random is added.
        max_kl: The largest mean KL to the original that is acceptable, in nats per token.
        seed: Seed of criterion random.
    """

    ratios: tuple[float, ...] = (0.125, 0.25, 0.5)
    criteria: tuple[Criterion, ...] = ("reap", "easy-ep", "frequency")
    max_kl: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise OptionError("this sweep cannot be meant", problems=problems)

    @property
    def all_criteria(self) -> tuple[Criterion, ...]:
        """With the baseline, each once."""
        return tuple(dict.fromkeys((*self.criteria, BASELINE)))

    def _problems(self) -> Iterator[str]:
        if not self.ratios or not self.criteria:
            yield "ratios and criteria must name at least one each"
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                yield f"ratio ({ratio}) must lie between 0 and 1"
        for criterion in self.criteria:
            if criterion not in CRITERIA or criterion == "given":
                known = ", ".join(c for c in CRITERIA if c != "given")
                yield f"criterion ({criterion}) must be one of {known}"
        if self.max_kl is not None and not self.max_kl > 0:
            yield f"max_kl ({self.max_kl}) must be above 0"
