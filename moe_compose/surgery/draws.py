"""Randomness with an address: every draw has its own generator, seeded from (seed, name).

No draw depends on any other, so tensors can be made in any order, on any number of threads, twice,
or after a kill, and come out the same. NumPy's PCG64 rather than torch's generator, which fills
normal variates differently with and without vector instructions. NumPy may change a stream between
versions; a test pins ours.
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
