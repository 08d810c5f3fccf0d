"""An evaluation, as a screen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .screens import facts, grid_of, inset, listed, title

if TYPE_CHECKING:
    from moe_compose.evaluation.result import DomainScore, Evaluation

#: Layers that are shown one by one.
SHOWN = 12


def evaluation_screen(found: Evaluation) -> RenderableType:
    """Figures by domain; beside a reference, layers and decoding too."""
    beside = f"against {found.against}; " if found.against else ""
    parts: list[RenderableType] = [
        title(found.checkpoint, f"{beside}losses and KL in nats per token"),
        inset(_scores(found)),
    ]
    if found.layers:
        parts += [Text(""), title("layers", "‖Δ‖/‖reference‖ of their outputs"), _layers(found)]
    if found.greedy:
        parts += [Text(""), title("greedy decoding", ""), facts(_greedy(found))]
    if found.notes:
        parts.append(facts(listed("note", found.notes)))
    return Group(*parts)


def _scores(found: Evaluation) -> Table:
    named = [*found.domains.items()]
    if len(named) > 1:
        named.append(("all", found.overall))
    head = ["domain", "tokens", "loss", "ppl"]
    if found.against:
        head += ["reference", "KL", "top-1", "overlap"]
    return grid_of(head, [(name, *_score(score)) for name, score in named], 1)


def _score(score: DomainScore) -> tuple[str, ...]:
    shown = (f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.perplexity:.2f}")
    if score.kl is None or score.top1 is None or score.overlap is None:
        return shown
    return (
        *shown,
        f"{score.reference_loss:.4f}",
        f"{score.kl:.2e}",
        f"{score.top1:.2%}",
        f"{score.overlap:.4f}",
    )


def _layers(found: Evaluation) -> RenderableType:
    """All layers, or as many as fit, evenly."""
    step = -(-len(found.layers) // SHOWN)
    shown = [x for x in found.layers if x.layer % step == 0 or x is found.layers[-1]]
    finite = [x.error for x in found.layers if math.isfinite(x.error)]
    most = max(finite, default=0.0) or 1.0

    def bar(error: float) -> str:
        return "█" * round(24 * error / most) if math.isfinite(error) else "not finite"

    rows = [(str(x.layer), f"{x.error:.1e}", Text(bar(x.error), style="cyan")) for x in shown]
    return inset(grid_of(("layer", "error", ""), rows))


def _greedy(found: Evaluation) -> list[tuple[str, RenderableType]]:
    def said(first: int | None, tokens: int) -> str:
        if first is None:
            return f"the same {tokens} tokens"
        return f"differs from token {first + 1} of {tokens} on"

    return [(g.domain, said(g.first, g.tokens)) for g in found.greedy]
