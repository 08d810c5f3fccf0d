"""The forward pass through Triton, as a screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from .screens import facts, grid_of, listed, title

if TYPE_CHECKING:
    from moe_compose.validation.forward_report import ForwardPass, LayerForward

#: Layers that are shown one by one.
SHOWN = 8


def forward_screen(found: ForwardPass) -> Iterator[RenderableType]:
    """Errors of eager and of Triton per layer and end to end, and what was left out."""
    yield title(
        "forward pass",
        f"Triton {found.triton} on {found.device}; {found.text}; errors relative to fp64",
    )
    dtypes = list(found.layers[0].errors)
    shown = worst(found.layers)
    rows = [
        (
            f"layer {x.layer}",
            f"{x.tokens} + {x.probes}",
            f"{x.experts} of {x.num_experts}",
            *(f"{e:.1e}" for d in dtypes for e in (x.errors[d].eager, x.errors[d].triton)),
        )
        for x in shown
    ]
    rows += [
        ("logits", str(x.tokens), "", f"{x.errors.eager:.1e}", f"{x.errors.triton:.1e}")
        + ("", "") * (len(dtypes) - 1)
        for x in found.logits
    ]
    named = [f"{d} {who}" for d in dtypes for who in ("eager", "Triton")]
    yield Padding(
        grid_of(("", "tokens + probes", "experts", *named), rows, 1), (0, 0, 0, 2), expand=False
    )
    if len(shown) < len(found.layers):
        text = f"the worst {len(shown)} of {len(found.layers)} layers; all are in validation.json"
        yield Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False)
    within = found.budget and found.seconds <= found.budget
    limit = f" of at most {found.budget:.0f}" if within else ""
    yield facts(
        [
            ("covered", found.covered),
            *listed("left out", found.left_out),
            ("took", f"{found.seconds:.0f}{limit} s"),
        ]
    )


def worst(layers: Sequence[LayerForward]) -> list[LayerForward]:
    """Those where Triton is furthest off beside eager, in the model's order."""

    def how_bad(layer: LayerForward) -> float:
        return max(e.triton / max(e.eager, 1e-30) for e in layer.errors.values())

    return sorted(sorted(layers, key=how_bad)[-SHOWN:], key=lambda x: x.layer)
