"""Randomness with an address: every draw has its own generator, seeded from (seed, name).

No draw depends on any other, so tensors can be made in any order, on any number of threads, twice,
or after a kill, and come out the same. NumPy's PCG64 rather than torch's generator: its normal
variates come from one scalar algorithm on every CPU, while torch's depend on which vector
instructions the machine has.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """The address of a stream of random numbers.

    Attributes:
        seed: the operation's seed.
        name: what is drawn, usually the output tensor's name and a word for the purpose.
    """

    seed: int
    name: str

    def generator(self) -> np.random.Generator:
        """A fresh generator at the start of this stream."""
        import numpy as np

        key = hashlib.sha256(f"{self.seed}\0{self.name}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))


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
