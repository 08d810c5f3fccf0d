"""Why experts go: `moe-compose prune --explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from moe_compose.surgery.prune import REPORT_NAME

from .screens import grid_of, inset, title

if TYPE_CHECKING:
    from moe_compose.surgery.plan import Plan


def explain_screen(plan: Plan) -> RenderableType:
    """A row for each removed expert, and under each layer what is kept."""
    report = plan.reports[REPORT_NAME]
    rows: list[tuple[str, str, str, str]] = []
    for layer, removed in report["removed"].items():
        kept = ", ".join(map(str, report["kept"][layer]))
        guarded = report["guarded"].get(layer)
        guard = f" (guarded: {', '.join(map(str, guarded))})" if guarded else ""
        rows.append((layer, "", "", f"kept: {kept}{guard}"))
        rows += [("", str(r["expert"]), f"{r['worth']:.4g}", r["why"]) for r in removed]
    head = ("layer", "expert", str(report["criterion"]), "why it goes")
    what = "experts that go, the most valuable first, and those that stay"
    return Group(Text(""), title("explained", what), inset(grid_of(head, rows)))
