"""A packed expert, as a screen and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from moe_compose.composition.kept import STATS_PLACE
from moe_compose.reporting.units import bytes_text

from .output import visible

if TYPE_CHECKING:
    from moe_compose.surgery.plan import Plan


def packed(plan: Plan) -> dict[str, Any]:
    """What was packed."""
    size = sum(t.nbytes for t in plan.tensors.values())
    return {**plan.reports["expert.json"], "bytes": size, "statistics": STATS_PLACE in plan.files}


def pack_screen(plan: Plan) -> Text:
    """The same in a sentence."""
    found = packed(plan)
    size, beside = bytes_text(found["bytes"]), "with" if found["statistics"] else "without"
    head = f"Packed {found['name']} of {found['of']}: {len(plan.tensors)} tensors, {size}, "
    return Text(visible(f"{head}{beside} statistics of its text"))
