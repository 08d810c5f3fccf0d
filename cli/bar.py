"""Progress on a terminal. Nothing is printed here: rich draws on the console that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich
from rich.console import Console
from rich.table import Column
from rich.text import Text

from moe_compose.reporting.units import bytes_text


class Done(rich.ProgressColumn):
    """How much is done, in its unit, and how many of it a second."""

    def __init__(self, unit: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._unit = unit

    def render(self, task: rich.Task) -> Text:
        """`4 of 8 layers, 2/s`."""
        if task.total is None:
            return Text("")
        unit = "" if self._unit == "bytes" else f" {self._unit}"
        said = f"{self._text(task.completed)} of {self._text(task.total)}{unit}"
        speed = task.finished_speed or task.speed or 0
        return Text(f"{said}, {self._text(speed)}/s" if speed >= 1 else said)

    def _text(self, n: float) -> str:
        return bytes_text(round(n)) if self._unit == "bytes" else f"{n:,.0f}"


@contextmanager
def bar(console: Console, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar; told how much is done, and how much there is.

    Args:
        console: the terminal.
        what: is done; shortened where it would leave no room.
        unit: `bytes`, `tokens`, ...
    """
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=None),
        rich.TextColumn("{task.percentage:>3.0f}%", markup=False),
        Done(unit),
        rich.TimeRemainingColumn(elapsed_when_finished=True),
    )
    room = console.width // 3
    short = what if len(what) <= room else f"{what[: room - 1]}…"
    with rich.Progress(*columns, console=console) as shown:
        task = shown.add_task(short, total=None)
        try:
            yield lambda done, total: shown.update(task, completed=done, total=total)
        finally:  # of work that never began nothing stays
            shown.live.transient = shown.tasks[0].total is None
