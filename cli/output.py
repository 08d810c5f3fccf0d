"""The one module that prints.

Three modes, the same for every command: for people (screens on stdout), `--json` (one document on
stdout), `--quiet` (the one line that a script needs). Hints, progress, warnings and errors go to
stderr in all of them. Names from files are printed as they are: no markup is ever read from them,
and what is not printable is escaped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from moe_compose.checkpoint.writer import Progress
    from moe_compose.errors import MoeComposeError

Mode = Literal["human", "json", "quiet"]

#: Told how much is done, and how much there is.
Count = Callable[[int, int], None]

#: Seconds between two lines of progress where there is no terminal.
LINE_SECONDS = 10.0


def visible(text: str) -> str:
    """Text with everything that is not printable escaped: names cannot move the cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Output:
    """Where a command's results go. One per process: `out`.

    Attributes:
        mode: who reads.
        debug: tracebacks are shown.
        interrupted: what to tell somebody who presses Ctrl-C now.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at the start of a command."""
        self.mode: Mode = "human"
        self.debug = False
        self.interrupted = ""

    def configure(self, *, as_json: bool = False, quiet: bool = False) -> None:
        """Choose the mode; `--json` wins over `--quiet`."""
        self.mode = "json" if as_json else "quiet" if quiet else "human"
        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def show(self, screen: RenderableType) -> None:
        """A screen, for people only."""
        if self.mode == "human":
            self._console().print(screen)

    def result(self, document: Mapping[str, Any] | list[Any], line: str) -> None:
        """What the command found: the document with `--json`, the line with `--quiet`."""
        from moe_compose.reporting.documents import plain

        if self.mode == "json":
            narrow = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
            print(json.dumps(plain(document), indent=2, ensure_ascii=narrow))
        elif self.mode == "quiet":
            print(visible(line))

    def hint(self, text: str) -> None:
        """What to do next; not with `--quiet`."""
        if self.mode != "quiet":
            self._console(stderr=True).print(visible(text), style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something that deserves a look."""
        self._console(stderr=True).print(f"Warning: {visible(text)}", style="yellow")

    def error(self, error: MoeComposeError) -> None:
        """A sentence, the single problems, and what to do; with `--json` as a document too."""
        if self.mode == "json":
            found = {
                "type": type(error).__name__,
                "message": error.message,
                "problems": list(error.problems),
                "hint": error.hint,
                "exit_code": error.exit_code,
            }
            self.result({"error": found}, "")
        lines = [
            *(f"  - {p}" for p in error.problems),
            *([f"  {error.hint}"] if error.hint else []),
        ]
        self.failure(error.message, "\n".join(lines))

    def failure(self, message: str, more: str = "") -> None:
        """`Error: message`, and lines under it."""
        console = self._console(stderr=True)
        console.print("Error:", style="bold red", end=" ")
        console.print(visible(message), soft_wrap=True)
        if more:
            console.print(visible(more), soft_wrap=True)
        if self.debug and sys.exc_info()[0] is not None:
            console.print(visible(traceback.format_exc()), soft_wrap=True)

    def text(self, line: str) -> None:
        """A line on stdout in every mode (`--version`)."""
        print(visible(line))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what takes so long: a spinner on a terminal, a line elsewhere."""
        console = self._console(stderr=True)
        if self.mode == "quiet":
            yield
        elif console.is_terminal:
            with console.status(visible(what)):
                yield
        else:
            console.print(f"{visible(what)} ...", soft_wrap=True)
            yield

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[Progress], None] | None]:
        """Progress of a write in bytes, with rate and time left; None with `--quiet`."""
        with self.counting(what) as count:
            yield count and (lambda p: count(p.bytes_done, p.bytes_total))

    @contextmanager
    def counting(self, what: str, unit: str = "bytes") -> Iterator[Count | None]:
        """Progress in `bytes`, `tokens`, ..., with rate and time left; None with `--quiet`."""
        console = self._console(stderr=True)
        if self.mode == "quiet":
            yield None
        elif console.is_terminal:
            with _bar(console, what, unit) as report:
                yield report
        else:
            yield _lines(console, what, unit)

    def _console(self, *, stderr: bool = False) -> Console:
        from rich.console import Console

        return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def _bar(console: Console, what: str, unit: str) -> Iterator[Count]:
    from rich import progress as rich
    from rich.text import Text

    class _Rate(rich.ProgressColumn):
        """The unit, and how many of it a second."""

        def __init__(self, unit: str) -> None:
            super().__init__()
            self._unit = unit

        def render(self, task: rich.Task) -> Text:
            speed = task.finished_speed or task.speed
            rate = f", {speed:,.0f}/s" if speed and speed >= 1 else ""
            return Text(f"{self._unit}{rate}")

    in_bytes = (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn())
    counted = (rich.MofNCompleteColumn(), _Rate(unit))
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=None),
        rich.TextColumn("{task.percentage:>3.0f}%", markup=False),
        *(in_bytes if unit == "bytes" else counted),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task(visible(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(console: Console, what: str, unit: str) -> Count:
    """A line every ten seconds, and one at the end."""
    from moe_compose.reporting.units import bytes_text

    def text(n: int) -> str:
        return bytes_text(n) if unit == "bytes" else f"{n:,} {unit}"

    begun = last = time.monotonic()
    first: int | None = None

    def report(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = done if first is None else first  # what an earlier run left
        finished = done >= total
        if not finished and now - last < LINE_SECONDS:
            return
        last = now
        rate = (done - first) / max(now - begun, 1e-3) if done > first else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        speed = f", {text(round(rate))}/s" if rate else ""
        share = done / total if total else 1
        rest = "" if finished else left
        begin = text(done) if unit == "bytes" else f"{done:,}"
        line = f"{visible(what)}: {begin} of {text(total)} ({share:.0%}){speed}{rest}"
        console.print(line, soft_wrap=True)

    return report


class LogHandler(logging.Handler):
    """Shows the library's warnings (everything, with `--debug`) on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            out.warn(text)
        else:
            out.hint(text)


#: The output of this process.
out = Output()
