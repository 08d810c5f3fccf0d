"""Lists of positions (of neurons, rows, experts), stored in a few words however long they are.

A plan for a large model holds hundreds of thousands of them, so what is drawn at random is kept as
its address and drawn when needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moe_compose.surgery.draws import Draw

if TYPE_CHECKING:
    import numpy as np


class Indices(Protocol):
    """A list of positions that may be drawn only when needed: `Sample`, `SampleSlice`, `Rows`."""

    def indices(self) -> np.ndarray:
        """int64, in order."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions `start:stop`."""

    start: int
    stop: int

    def indices(self) -> np.ndarray:
        import numpy as np

        return np.arange(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True, slots=True)
class Picks:
    """Positions listed one by one, repeats allowed."""

    positions: tuple[int, ...]

    def indices(self) -> np.ndarray:
        import numpy as np

        return np.asarray(self.positions, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def __str__(self) -> str:
        shown = ",".join(map(str, self.positions[:8]))
        return shown + (f",… ({len(self.positions)})" if len(self.positions) > 8 else "")


@dataclass(frozen=True, slots=True)
class Sample:
    """`count` distinct indices out of `range(population)`, drawn, not stored: a plan holds
    thousands of these.

    Attributes:
        draw: the address; equal addresses give equal samples, which is how three matrices share one
            neuron set.
        population: how many there are to choose from.
        count: how many are chosen.
        ordered: ascending indices; otherwise in the drawn order (a shuffle).
    """

    draw: Draw
    population: int
    count: int
    ordered: bool = True

    def indices(self) -> np.ndarray:
        """int64, `[count]`."""
        import numpy as np

        drawn = self.draw.generator().permutation(self.population)[: self.count]
        return np.sort(drawn) if self.ordered else drawn

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        kind = "set" if self.ordered else "order"
        return (
            f"{self.count} of {self.population} ({kind} {self.draw.name!r}, seed {self.draw.seed})"
        )


@dataclass(frozen=True, slots=True)
class SampleSlice:
    """Positions `start:stop` of a sample's drawn order (one expert's share of a shuffled FFN)."""

    sample: Sample
    start: int
    stop: int

    def indices(self) -> np.ndarray:
        """int64, `[stop - start]`."""
        return self.sample.indices()[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}] of {self.sample}"


@dataclass(frozen=True, slots=True)
class Order:
    """Positions listed one by one, four bytes each: how one expert's neurons correspond to
    another's.

    Attributes:
        packed: unsigned little-endian numbers of four bytes.

    Example:
        >>> Order.of([2, 0, 1]).indices().tolist()
        [2, 0, 1]
    """

    packed: bytes

    @classmethod
    def of(cls, positions: Iterable[int]) -> Order:
        """From numbers."""
        import numpy as np

        return cls(np.asarray(list(positions), dtype="<u4").tobytes())

    @property
    def is_permutation(self) -> bool:
        """Whether every position is there once."""
        return sorted(self.indices().tolist()) == list(range(len(self)))

    @property
    def moved(self) -> int:
        """How many positions are not in their own place."""
        return sum(int(p) != i for i, p in enumerate(self.indices()))

    def indices(self) -> np.ndarray:
        """int64, in order."""
        import numpy as np

        return np.frombuffer(self.packed, dtype="<u4").astype(np.int64)

    def __len__(self) -> int:
        return len(self.packed) // 4

    def __str__(self) -> str:
        return f"{len(self)} neurons, {self.moved} moved"


@dataclass(frozen=True, slots=True)
class Fused:
    """An order of neurons that have two positions each, gate and up in one matrix.

    Attributes:
        order: of the neurons.
        pairs: neuron i lies at 2i and 2i + 1; otherwise at i and F + i.
    """

    order: Order
    pairs: bool

    def indices(self) -> np.ndarray:
        """int64, `[2F]`."""
        import numpy as np

        at = self.order.indices()
        if self.pairs:
            return np.stack((2 * at, 2 * at + 1), axis=1).reshape(-1)
        return np.concatenate((at, at + len(at)))

    def __len__(self) -> int:
        return 2 * len(self.order)

    def __str__(self) -> str:
        return f"{self.order}, gate and up {'in turn' if self.pairs else 'in halves'}"
