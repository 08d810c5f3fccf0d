"""What was done to a checkpoint, as lines of its screen. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from moe_compose.reporting.steps import Step, steps_of
from moe_compose.reporting.units import count

from .output import visible


def history_rows(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, RenderableType]]:
    """Label and text of each operation, oldest first, numbered where there are several."""
    steps = list(steps_of(history))
    return [
        ("history" if i == 0 else "", _line(step, f"{i + 1}. " if len(steps) > 1 else ""))
        for i, step in enumerate(steps)
    ]


def _line(step: Step, number: str) -> Text:
    sources = f" of {', '.join(step.sources)}" if step.sources else ""
    options = "; ".join(f"{name} {value}" for name, value in step.options.items())
    size = f"{count(step.total)} parameters, " if step.total is not None else ""
    said = f"{size}preservation {step.preservation}, plan {step.digest[:8]}"
    return Text.assemble(
        visible(f"{number}{step.operation}{sources}"),
        visible(f"\n{options}") if options else "",
        visible(f"\n{said}"),
    )
