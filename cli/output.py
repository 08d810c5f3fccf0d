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
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from .patience import Patience
from .programs import runnable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from moe_compose.checkpoint.writer import Progress
    from moe_compose.errors import MoeComposeError

Mode = Literal["human", "json", "quiet"]

#: Told how much is done, and how much there is.
Count = Callable[[int, int], None]

#: Seconds between two lines of progress where there is no terminal.
LINE_SECONDS = 10.0

#: An indented line that is to be copied.
_COMMAND = re.compile(r"\s+(\S*(moe-compose|python|pip|tensorboard)|PeftModel\S*) ")


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
        self._told = False
        self._live: Console | None = None
        self._patience: Patience | None = None

    def configure(self, *, as_json: bool = False, quiet: bool = False) -> None:
        """Choose the mode; `--json` wins over `--quiet`."""
        self.settle()
        self.mode = "json" if as_json else "quiet" if quiet else "human"
        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        elif (console := self._console(stderr=True)).is_terminal:
            self._patience = Patience(console)

    def settle(self) -> None:
        """Whoever waits for a first word has it."""
        if self._patience is not None:
            self._patience.end()
            self._patience = None

    def show(self, screen: RenderableType) -> None:
        """A screen, for people only."""
        if self.mode != "human":
            return
        console = self._console()
        if console.is_terminal:
            console.print(screen)
        else:  # no spaces at the ends of lines
            with console.capture() as printed:
                console.print(screen)
            print("\n".join(line.rstrip() for line in printed.get().split("\n")), end="")

    def result(self, document: Mapping[str, Any] | list[Any], line: str) -> None:
        """What the command found: the document with `--json`, the line with `--quiet`."""
        from moe_compose.reporting.documents import plain

        self.settle()
        if self.mode == "json":
            narrow = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
            print(json.dumps(plain(document), indent=2, ensure_ascii=narrow))
            self._told = True
        elif self.mode == "quiet" and line:
            print(visible(line))

    def hint(self, text: str) -> None:
        """What to do next; not with `--quiet`."""
        if self.mode != "quiet":
            self._say(runnable(text))

    def warn(self, text: str) -> None:
        """Something that deserves a look."""
        self._say(f"Warning: {text}", word="yellow")

    def error(self, error: MoeComposeError) -> None:
        """A sentence, the single problems, and what to do; with `--json` as a document too."""
        self.failure(
            type(error).__name__, error.message, error.problems, error.hint, error.exit_code
        )

    def failure(
        self, kind: str, message: str, problems: Sequence[str] = (), hint: str = "", code: int = 1
    ) -> None:
        """What went wrong, where it is no error of the library.

        Args:
            kind: what programs know it by.
            message: a sentence.
            problems: single faults.
            hint: what to do next.
            code: the exit code.
        """
        if self.mode == "json" and not self._told:  # one document
            found = {"type": kind, "message": message, "problems": list(problems), "hint": hint}
            self.result({"error": found | {"exit_code": code}}, "")
        self._say(f"Error: {message}", word="bold red")
        for line in (*(f"- {p}" for p in problems), *([hint] if hint else [])):
            self._say(f"  {line}")
        if self.debug and sys.exc_info()[0] is not None:
            self._console(stderr=True).print(visible(traceback.format_exc()), soft_wrap=True)

    def text(self, line: str) -> None:
        """A line on stdout in every mode (`--version`)."""
        self.settle()
        print(visible(line))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what takes so long: a spinner on a terminal, a line elsewhere."""
        console = self._console(stderr=True)
        if self.mode == "quiet":
            yield
        elif console.is_terminal:
            with self._above(console), console.status(visible(what)):
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
            from .bar import bar

            with self._above(console), bar(console, visible(what), unit) as report:
                yield report
        else:
            yield _lines(console, what, unit)

    def _say(self, text: str, *, word: str = "") -> None:
        """Prose on stderr: on a terminal broken at spaces, elsewhere not at all. `word` is the
        style of the first word; the others have none, which every background can show.
        """
        from rich.text import Text

        console = self._console(stderr=True)
        shown = visible(text)
        if console.is_terminal:
            shown = "\n".join(_broken(line, console.width) for line in shown.split("\n"))
        first = shown.partition(" ")[0]
        console.print(Text.assemble((first, word), shown[len(first) :]), soft_wrap=True)

    @contextmanager
    def _above(self, console: Console) -> Iterator[None]:
        """What goes to stderr meanwhile goes above what moves there."""
        self._live = console
        try:
            yield
        finally:
            self._live = None

    def _console(self, *, stderr: bool = False) -> Console:
        from rich.console import Console

        self.settle()
        if stderr and self._live is not None:
            return self._live
        return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _broken(line: str, width: int) -> str:
    """A line of prose, broken at spaces; a command stays whole, so that it can be copied."""
    words = line.lstrip()
    indent = " " * (len(line) - len(words))
    if len(line) <= width or _COMMAND.match(line):
        return line
    hanging = indent + ("  " if words.startswith("- ") or not indent else "")
    return textwrap.fill(
        words,
        width,
        initial_indent=indent,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _lines(console: Console, what: str, unit: str) -> Count:
    """A line every ten seconds, and one at the end."""
    from moe_compose.reporting.units import bytes_text

    def text(n: int) -> str:
        return bytes_text(n) if unit == "bytes" else f"{n:,} {unit}"

    begun = last = time.monotonic()
    first: int | None = None
    ended = False

    def report(done: int, total: int) -> None:
        nonlocal first, last, ended
        now = time.monotonic()
        first = done if first is None else first  # what an earlier run left
        finished = done >= total
        if ended or (not finished and now - last < LINE_SECONDS):
            return
        last, ended = now, finished
        rate = (done - first) / max(now - begun, 1e-3) if done > first else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        speed = f", {text(round(rate))}/s" if rate >= 1 else ""
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
