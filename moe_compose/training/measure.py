"""How good the model is on held-out text, and how its routers spread the tokens.

Shape suffixes: L sparse layers, E experts, B sequences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.calibration.tokens import TokenSet
from moe_compose.training.batches import Share, shares_of
from moe_compose.training.engine import Engine
from moe_compose.training.objectives import Objective
from moe_compose.training.routers import Routers, Seen


@dataclass(frozen=True, slots=True)
class Spread:
    """How a layer's tokens are spread over its experts.

    Attributes:
        load: share of all dispatches that each expert gets.
        entropy: of the load, over ln E: 1 where it is even.
        dead: experts that get no token.
        max_violation: largest load over the mean, less 1 (2408.15664).
    """

    load: tuple[float, ...]
    entropy: float
    dead: int
    max_violation: float

    @classmethod
    def of(cls, counts: Sequence[float]) -> Spread:
        """From how many tokens each expert got."""
        total = sum(counts) or 1.0
        load = [c / total for c in counts]
        entropy = -sum(p * math.log(p) for p in load if p) / max(math.log(len(load)), 1e-9)
        return cls(tuple(load), entropy, counts.count(0), max(load) * len(load) - 1)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation on held-out text.

    Attributes:
        step: after so many steps.
        loss: of the objective, nats per token.
        domains: the same by domain.
        layers: sparse layer → how tokens are spread.
    """

    step: int
    loss: float
    domains: Mapping[str, float]
    layers: Mapping[int, Spread]

    def __str__(self) -> str:
        said = [
            f"step {self.step}: held-out loss {self.loss:.4f}",
            f"entropy of the load {self.entropy:.3f}",
            f"dead experts {self.dead}",
            f"largest load {self.max_violation + 1:.2f} × the mean",
        ]
        return ", ".join(said)

    @property
    def dead(self) -> int:
        """Experts without tokens, of all layers."""
        return sum(s.dead for s in self.layers.values())

    @property
    def entropy(self) -> float:
        """Of the load, mean over layers."""
        return sum(s.entropy for s in self.layers.values()) / len(self.layers)

    @property
    def max_violation(self) -> float:
        """The largest of all layers."""
        return max(s.max_violation for s in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        layers = {str(i): asdict(s) for i, s in self.layers.items()}
        return {"step": self.step, "loss": self.loss, "domains": dict(self.domains)} | {
            "layers": layers
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Evaluated:
        """What `to_json` made."""
        layers = {
            int(i): Spread(tuple(s["load"]), s["entropy"], s["dead"], s["max_violation"])
            for i, s in found["layers"].items()
        }
        return cls(found["step"], found["loss"], found["domains"], layers)


@dataclass(frozen=True)
class Forward:
    """A model's forward pass, watched.

    Attributes:
        module: the model as the engine wants it called.
        routers: its routers.
    """

    module: nn.Module
    routers: Routers

    def run(self, share: Share) -> tuple[Tensor, dict[int, Seen]]:
        """Logits `[B, S, V]`, and what each layer's router did."""
        with self.routers.watching(share.real_BS.flatten()) as seen:
            logits_BSV = share.run(self.module)
        return logits_BSV, seen


def held_out_loss(
    forward: Forward,
    objective: Objective,
    tokens: TokenSet,
    chosen: Sequence[int],
    engine: Engine,
    *,
    batch: int,
    step: int,
) -> Evaluated:
    """Evaluate on sequences, every process a share of them.

    Args:
        forward: the model.
        objective: whose loss is measured.
        tokens: held-out text.
        chosen: its sequences.
        engine: the processes.
        batch: sequences that run together.
        step: for the record.
    """
    found = {d: torch.zeros((), dtype=torch.float64, device=engine.device) for d in tokens.domains}
    counts_LE: Tensor | None = None
    with torch.no_grad():
        for share in shares_of(tokens, chosen, batch, engine.rank, engine.size, engine.device):
            logits_BSV, seen = forward.run(share)
            losses_B = objective.losses(logits_BSV, share, seen)
            for domain, loss in zip(share.domains, losses_B, strict=True):
                found[domain] += loss
            more_LE = torch.stack([s.counts_E for s in seen.values()]).double()
            counts_LE = more_LE if counts_LE is None else counts_LE + more_LE
            layers = tuple(seen)
    assert counts_LE is not None
    counted: Counter[str] = Counter()
    for i in chosen:
        sequence = tokens.sequences[i]
        counted[tokens.domains[sequence.domain]] += objective.counted(len(sequence.ids))
    sums_D = engine.total(torch.stack([found[d] for d in tokens.domains]))
    sums = dict(zip(tokens.domains, sums_D.tolist(), strict=True))
    spread = [Spread.of(row) for row in engine.total(counts_LE).tolist()]
    return Evaluated(
        step=step,
        loss=sum(sums.values()) / counted.total(),
        domains={d: sums[d] / n for d, n in counted.items()},
        layers=dict(zip(layers, spread, strict=True)),
    )
