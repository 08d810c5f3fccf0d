"""Several processes that measure together: each its part of the text, summed in their order.

Where torch.distributed is initialised (`torchrun`, or the caller), every process streams the whole
model on its part of the sequences. After each layer the sums of all are gathered and added in rank
order, never in order of arrival, so every process holds the same bits. What is written, the first
process writes.

All make the same calls of `gather` in the same order. A process that fails makes one more, with its
error, which the others find in the call that they come to next; so all end, and none waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from moe_compose.errors import MoeComposeError

T = TypeVar("T")

#: Class, message, problems and hint of an error.
_Told = tuple[type[MoeComposeError], str, tuple[str, ...], str]


class Ranks:
    """This process among those that measure; alone where torch.distributed is not initialised.

    Attributes:
        rank: its place; the first one is 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        several = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if several else 0
        self.size = distributed.get_world_size() if several else 1
        self._told = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """Everybody's, in rank order.

        Raises:
            MoeComposeError: another process failed; of the class that failed there.
        """
        return self._exchange(mine, None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all do, and that fails for all if it fails for one.

        Raises:
            MoeComposeError: another process failed.
        """
        try:
            yield
            self.gather(None)
        except Exception as error:
            if not self._told:
                self._tell(error)
            raise

    def device(self) -> str:
        """Where to compute by default: threads do not inherit a current device, so it is named."""
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if self.size == 1 else f"cuda:{torch.cuda.current_device()}"

    def _tell(self, error: Exception) -> None:
        if isinstance(error, MoeComposeError):
            told: _Told = (type(error), error.message, error.problems, error.hint)
        else:
            told = (MoeComposeError, f"{type(error).__name__}: {error}", (), "")
        try:
            self._exchange(None, told)
        except Exception:  # the others are told, or gone; what is raised is what happened here
            return

    def _exchange(self, mine: T, error: _Told | None) -> list[T]:
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, (mine, error))
        for rank, (_, told) in enumerate(found):
            if told is not None:
                self._told = True
                kind, message, problems, hint = told
                place = f"process {rank} of {self.size}"
                raise kind(f"{place}: {message}", problems=problems, hint=hint)
        return [value for value, _ in found]
