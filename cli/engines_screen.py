"""What other engines make of a checkpoint, as a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .output import visible
from .screens import title

if TYPE_CHECKING:
    from moe_compose.validation.report import Served, ValidationReport

_SIGNS = {
    "same": ("✓", "green"),
    "differs": ("✗", "bold red"),
    "refuses": ("✗", "bold red"),
    "not run": ("–", "dim"),
}


def engines_screen(report: ValidationReport) -> RenderableType:
    """Engine by engine: the verdict, why, and which rules of the portable profile are broken."""
    grid = Table.grid(padding=(0, 1))
    for _ in range(2):
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for engine in report.engines:
        sign, style = _SIGNS["differs" if engine.failed else engine.verdict]
        grid.add_row(Text(sign, style), Text(visible(engine.engine)), _text(engine))
    against = f"against transformers {report.versions.get('transformers', '')}, float32"
    return Group(title("engines", against), Padding(grid, (0, 0, 0, 2), expand=False), Text(""))


def _text(engine: Served) -> Text:
    version = f" in {engine.version}" if engine.version else ""
    text = Text(visible(f"{engine.verdict}{version}: {engine.detail}"))
    if engine.failed:
        text.append("; it was named (--engine-python), so that this counts as a failure")
    if not engine.rules and engine.verdict == "not run":
        text.append("; it breaks no rule known of this engine")
    for rule in engine.rules:
        text.append("\n! ", "yellow")
        text.append(visible(rule))
    return text
