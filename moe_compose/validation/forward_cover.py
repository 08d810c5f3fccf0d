"""How much of a forward pass is run, so that the slow interpreter stays within a stated time.

Every layer gets an equal share of what is left. Its experts are run a few at a time, until the
share is used up; where that is before all were run, the next layer begins with others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Experts that are run at once, at most: they are copied, in fp64 as well.
_AT_ONCE = 32


@dataclass
class Cover:
    """Seconds, and what they suffice for.

    Attributes:
        seconds: that all may take; None: as long as it takes.
        layers: layers to run.
    """

    seconds: float | None
    layers: int
    _begin: float = field(default_factory=lambda: time.monotonic())
    _done: int = 0
    _rate: float = 0.0
    _whole: float = 0.0

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._begin

    @property
    def up(self) -> bool:
        """Whether the time is up; not before one layer is done."""
        return self.seconds is not None and self._done > 0 and self.spent >= self.seconds

    def parts(self, experts: int, weights: int) -> Iterator[Tensor]:
        """Ids of experts to run next in one layer, ascending; ends when its share is used up.

        Args:
            experts: E.
            weights: elements of one expert.
        """
        begin, used, run = self.spent, 0.0, 0
        share = float("inf")
        if self.seconds is not None:
            share = max(self.seconds - begin, 0.0) / max(self.layers - self._done, 1)
        while run < experts:
            count = self._next(share - used, weights) if run or self._rate else 1
            if not count and run:
                break
            count = min(max(count, 1), experts - run, _AT_ONCE)
            offset = self._done * 7 + run if share < float("inf") else run
            yield torch.sort((offset + torch.arange(count)) % experts).values
            run += count
            used = self.spent - begin
            self._rate = used / (run * weights)
        self._done += 1
        self._whole += used * experts / run

    def _next(self, left: float, weights: int) -> int:
        """Experts that half of the seconds `left` suffice for, but one if all of them do."""
        each = self._rate * weights
        return int(min(left / 2 / each, 1e9)) or int(left >= each)

    def affords_logits(self, streaming: float) -> bool:
        """Whether two more passes still fit, one over all experts of all layers with Triton.

        Args:
            streaming: seconds of the pass so far beside the experts.
        """
        if self.seconds is None:
            return True
        return self.spent + self._whole + 2 * max(streaming, 0.0) <= self.seconds

    @property
    def experts(self) -> float:
        """Seconds that all experts of all layers so far would take."""
        return self._whole
