"""What is merged with what: `moe-compose merge --explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from moe_compose.surgery.merge import REPORT_NAME

from .screens import grid_of, inset, title

if TYPE_CHECKING:
    from moe_compose.surgery.plan import Plan


def groups_screen(plan: Plan) -> RenderableType:
    """A row for each expert of the result: its members, their weights, and the neurons moved."""
    rows: list[tuple[str, str, str, str, str]] = []
    for layer, groups in plan.reports[REPORT_NAME]["layers"].items():
        for i, group in enumerate(groups):
            members = ", ".join(map(str, group["experts"]))
            weights = ", ".join(f"{w:.3f}" for w in group["weights"])
            moved = ", ".join(map(str, group["neurons_moved"][1:]))
            rows.append(("" if i else layer, str(i), members, weights, moved))
    head = ("layer", "expert", "mean of", "weights", "neurons moved")
    what = "experts of the result, and what they are means of"
    return Group(Text(""), title("explained", what), inset(grid_of(head, rows)))
