"""What a sweep found, and the rules by which it names candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_compose.tradeoff.options import BASELINE

#: How the knee is found, in words.
KNEE_RULE = (
    "the best candidate of each size without the baseline, and the original, as a curve of KL over "
    "the share of experts kept; both axes from 0 to 1; the candidate farthest below the straight "
    "line between its ends"
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pruned model that was evaluated, and never written.

    Attributes:
        criterion: by which experts were kept.
        keep: experts a layer.
        share: of the original's experts.
        refitted: whether its down-projections were.
        parameters, active: in all, and for one token.
        bytes: on disk.
        loss: nats per token, on the held-out text.
        kl: mean KL(original ‖ candidate), nats per token.
        top1: share of positions where both rank the same token first.
        domain_kl: by domain.
        digest: of the plan.
    """

    criterion: str
    keep: int
    share: float
    refitted: bool
    parameters: int
    active: int
    bytes: int
    loss: float
    kl: float
    top1: float
    domain_kl: Mapping[str, float]
    digest: str

    @property
    def name(self) -> str:
        """In few words."""
        return f"{self.criterion}, {self.keep} experts{', refitted' if self.refitted else ''}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Quality against size.

    Attributes:
        source: label of the original.
        experts: it has, a layer.
        parameters, bytes: of the original.
        loss: of the original.
        candidates: by size, the largest first, then by KL.
        knee: where giving up more experts begins to cost more; None where the curve has none.
        max_kl: as asked.
        chosen: the smallest candidate within it; None if none is, or nothing was asked.
        notes: what was left out, and why.
        options: as asked.
        data: domain → files of the held-out text, with hashes.
    """

    source: str
    experts: int
    parameters: int
    bytes: int
    loss: float
    candidates: tuple[Candidate, ...]
    knee: Candidate | None = None
    max_kl: float | None = None
    chosen: Candidate | None = None
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, and the rule of the knee."""
        return {**asdict(self), "knee_rule": KNEE_RULE}


def curve(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best of each size, the baseline left out, the largest first."""
    best: dict[int, Candidate] = {}
    for c in candidates:
        if c.criterion != BASELINE and (c.keep not in best or c.kl < best[c.keep].kl):
            best[c.keep] = c
    return [best[keep] for keep in sorted(best, reverse=True)]


def knee(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate at the knee of the curve, see `KNEE_RULE`; None below two candidates on it, or
    where no point lies below the line.
    """
    points = curve(candidates)
    last = points[-1] if points else None
    if last is None or len(points) < 2 or last.kl <= 0:
        return None
    width = 1.0 - last.share

    def depth(c: Candidate) -> float:
        across = (1.0 - c.share) / width  # 0 at the original, 1 at the smallest
        return (across - c.kl / last.kl) / math.sqrt(2)

    found = max(points[:-1], key=depth)
    return found if depth(found) > 0 else None


def smallest_within(candidates: Sequence[Candidate], max_kl: float) -> Candidate | None:
    """The smallest candidate whose KL is at most so large; of several, the one of the least KL."""
    within = [c for c in candidates if c.kl <= max_kl]
    return min(within, key=lambda c: (c.keep, c.kl), default=None)


def findings(found: Sweep) -> Iterator[str]:
    """The findings, a sentence each."""
    if found.knee is not None:
        yield f"knee: {found.knee.name} (KL {found.knee.kl:.4f})"
    if found.max_kl is not None:
        if found.chosen is None:
            yield f"no candidate is within KL {found.max_kl:g}"
        else:
            c = found.chosen
            yield f"smallest within KL {found.max_kl:g}: {c.name} (KL {c.kl:.4f})"
