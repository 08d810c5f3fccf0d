"""Low-rank adapters of the experts' matrices (LoRA, 2106.09685), one pair per expert and matrix.

Shape suffixes: E experts, D model, F expert width, P = 2F if gated, F otherwise, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from moe_compose.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ExpertLora:
    """`z += s · B_1 A_1 x` and `y += s · B_2 A_2 h`, beside the experts' own matrices.

    Each pair is optional, and has its own rank R ≥ 1. They lie as written here whatever the experts
    do: `transposed` says nothing of them. The P rows of `gate_up_b` are in the order of those of
    `gate_up`: all gates before all ups, or alternating if the layout is `interleaved`.

    Attributes:
        gate_up_a: A_1, `[E, R, D]`.
        gate_up_b: B_1, `[E, P, R]`.
        down_a: A_2, `[E, R, F]`.
        down_b: B_2, `[E, D, R]`.
        scale: s; in PEFT's terms alpha / R, or alpha / √R.

    Raises:
        OptionError: half a pair.
    """

    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, (a, b) in self.pairs.items():
            if (a is None) != (b is None):
                missing = f"{name}_{'a' if a is None else 'b'}"
                raise OptionError(
                    f"a low-rank addition to {name} needs both matrices ({missing} is missing)"
                )

    @property
    def pairs(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """A and B by the matrix that they add to."""
        return {
            "gate_up": (self.gate_up_a, self.gate_up_b),
            "down": (self.down_a, self.down_b),
        }

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that exist."""
        return tuple(t for pair in self.pairs.values() for t in pair if t is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertLora:
        """The same with `function` of every tensor."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        mapped: dict[str, Any] = {n: function(t) for n, t in given if isinstance(t, Tensor)}
        return replace(self, **mapped)

    def problems(self, experts: int, model: int, fused: int, width: int) -> Iterator[str]:
        """What does not fit a layer of E, D, P, F."""
        sides = {"gate_up": (fused, model), "down": (model, width)}
        for name, (a, b) in self.pairs.items():
            if a is None or b is None:
                continue
            rank = a.shape[1] if a.dim() == 3 else 0
            if not rank:
                yield f"{name}_a must be [experts, rank, inputs] (got {list(a.shape)})"
                continue
            rows, columns = sides[name]
            wanted = {"a": [experts, rank, columns], "b": [experts, rows, rank]}
            for half, tensor in (("a", a), ("b", b)):
                if list(tensor.shape) != wanted[half]:
                    yield f"{name}_{half} must be {wanted[half]} (got {list(tensor.shape)})"
