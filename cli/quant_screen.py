"""A quantisation plan as a screen. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_compose.reporting.units import bytes_text

from .screens import facts, grid_of, listed, title

if TYPE_CHECKING:
    from moe_compose.calibration.quantisation import LayerBits, QuantPlan

#: Experts that are named in a line.
_NAMED = 12


def quant_screen(plan: QuantPlan) -> RenderableType:
    """Bits by layer, and what they save."""
    options = plan.options
    low, high = options.bits_low, options.bits_high
    experts, total = ([bytes_text(n) for n in pair] for pair in (plan.bytes, plan.total_bytes))
    rows: list[tuple[str, RenderableType]] = [
        ("experts", f"{plan.count(low):,} at {low} bits, {plan.count(high):,} at {high}"),
        ("mean", f"{plan.mean_bits:.2f} bits a weight, scales left out"),
        ("bytes", f"experts {' → '.join(experts)}, checkpoint {' → '.join(total)}"),
        ("at stake", f"{plan.low_weight:.1%} of the sensitivity lies at {low} bits"),
        ("sensitivity", f"{options.measure}: {options.formula}"),
        ("", Text(options.reference, style="dim")),
        *listed("note", plan.notes),
    ]
    head = ("layer", "least", "most", f"at {low} bits", "experts")
    table = grid_of(head, [_row(layer, low) for layer in plan.layers])
    for column in table.columns[:4]:
        column.justify = "right"
    inset = Padding(table, (1, 0, 0, 2), expand=False)
    return Group(title(plan.source, "bits for its experts"), facts(rows), inset)


def _row(layer: LayerBits, low: int) -> Sequence[RenderableType]:
    found = [e for e, bits in enumerate(layer.bits) if bits == low]
    rest = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    every = "all" if len(found) == len(layer.bits) else ""
    return (
        str(layer.layer),
        f"{min(layer.sensitivity):.3g}",
        f"{max(layer.sensitivity):.3g}",
        f"{len(found)} of {len(layer.bits)}",
        every or ", ".join(map(str, found[:_NAMED])) + rest or "–",
    )
