"""What an evaluation found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class DomainScore:
    """One domain's text, or all of it. Losses and divergences in nats per token.

    Attributes:
        tokens: positions, padding not counted.
        predicted: positions that have a next token.
        loss: mean `−ln p(next token)`.
        reference_loss: of the reference; None without one, and so the rest.
        kl: mean KL(reference ‖ model).
        top1: share of positions where both rank the same token first.
        overlap: mean `Σ min(p, q)`.
    """

    tokens: int
    predicted: int
    loss: float
    reference_loss: float | None = None
    kl: float | None = None
    top1: float | None = None
    overlap: float | None = None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; NaN for a loss that is none."""
        return math.exp(self.loss) if not self.loss >= 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values, perplexity included."""
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True, slots=True)
class LayerScore:
    """How far a layer's output is from the reference's.

    Attributes:
        layer: its index.
        error: `‖Δ‖₂ / ‖reference‖₂` over all positions.
    """

    layer: int
    error: float


@dataclass(frozen=True, slots=True)
class Greedy:
    """Where greedy decoding parts ways.

    Attributes:
        domain: of the prompt.
        prompt: its tokens.
        tokens: decoded by the reference.
        first: index of the first decoded token that differs; None if none does.
    """

    domain: str
    prompt: int
    tokens: int
    first: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on held-out text, and beside another.

    Attributes:
        checkpoint: label of what was evaluated.
        against: label of the reference, or None.
        domains: by name.
        overall: over all tokens.
        layers: by layer; empty without a reference, or when depths differ.
        greedy: one a domain; empty when not asked for.
        notes: what was left out, and why.
        data: domain → files with hashes.
        options: as asked.
        versions: of the packages that took part.
    """

    checkpoint: str
    against: str | None
    domains: Mapping[str, DomainScore]
    overall: DomainScore
    layers: tuple[LayerScore, ...] = ()
    greedy: tuple[Greedy, ...] = ()
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether every domain has a loss that is a number."""
        return all(math.isfinite(score.loss) for score in self.domains.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        scores = {name: score.to_json() for name, score in self.domains.items()}
        return {**asdict(self), "domains": scores, "overall": self.overall.to_json()}
