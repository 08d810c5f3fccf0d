"""What a refit recovered, and a sweep, as screens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from moe_compose.recovery.refit import REPORT_NAME as REFIT
from moe_compose.reporting.units import bytes_text, count
from moe_compose.tradeoff.fewest import REPORT_NAME as MAX_KL
from moe_compose.tradeoff.result import findings

from .output import visible
from .screens import grid_of, inset, title

if TYPE_CHECKING:
    from moe_compose.surgery.plan import Plan
    from moe_compose.tradeoff.result import Sweep


def recovery_screen(plan: Plan) -> RenderableType:
    """What was tried for a KL, and what each layer gained; nothing where neither was asked."""
    parts: list[RenderableType] = []
    if (tried := plan.reports.get(MAX_KL)) is not None:
        rows = [_tried(c) for c in sorted(tried["tried"], key=lambda c: -c["keep"])]
        parts += [Text(""), title("tried", f"for KL ≤ {tried['max_kl']:g}, by bisection")]
        parts.append(inset(grid_of(("experts", "KL", "top-1", "loss"), rows)))
    if (found := plan.reports.get(REFIT)) is not None:
        layers = [_layer(number, entry) for number, entry in found["layers"].items()]
        what = "error of the routed output on held-out sequences"
        parts += [Text(""), title("refit", what)]
        parts.append(inset(grid_of(("layer", "before", "after", "experts", ""), layers)))
    return Group(*parts)


def sweep_screen(found: Sweep) -> RenderableType:
    """Quality against size, the original first."""
    head = ("criterion", "experts", "params", "bytes", "loss", "KL", "top-1", "")
    size = (count(found.parameters), bytes_text(found.bytes))
    rows = [("original", str(found.experts), *size, f"{found.loss:.4f}", "0", "100.00%", "")]
    rows += [
        (
            c.criterion,
            str(c.keep),
            count(c.parameters),
            bytes_text(c.bytes),
            f"{c.loss:.4f}",
            f"{c.kl:.4f}",
            f"{c.top1:.2%}",
            ", ".join(w for w, x in (("knee", found.knee), ("chosen", found.chosen)) if c is x),
        )
        for c in found.candidates
    ]
    refitted = any(c.refitted for c in found.candidates)
    rest = "loss and KL in nats per token" + ("; all refitted" if refitted else "")
    parts = [title(found.source, rest), inset(grid_of(head, rows, 1))]
    said = [inset(Text(visible(text))) for text in (*findings(found), *found.notes)]
    return Group(*parts, *([Text("")] if said else []), *said)


def _tried(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    return (
        str(entry["keep"]),
        f"{entry['kl']:.4f}",
        f"{entry['top1']:.2%}",
        f"{entry['loss']:.4f}",
    )


def _layer(number: str, entry: dict[str, Any]) -> tuple[str, str, str, str, str]:
    left = len(entry["left"])
    said = "" if entry["changed"] else "left as it was: no gain"
    said += f"{'; ' if said else ''}{left} with too few tokens" if left else ""
    after = f"{entry['after']:.3f}"
    return (number, f"{entry['before']:.3f}", after, str(len(entry["experts"])), said)
