"""What `--help` looks like: flags and commands in groups, every summary in full, and no line broken
at the hyphen of a flag.

typer groups by `rich_help_panel` in its boxes only, which read brackets as markup; this is the same
in plain lines.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

#: Widest page; on a wider terminal lines of prose only get harder to read.
WIDEST = 100

_COLUMN = 30
#: What typer calls the value of a flag that says nothing else, and what we call it.
_NAMES = {"int": "INT", "float": "FLOAT", "str": "TEXT", "path": "FILE"}
_TYPE = re.compile(f"<({'|'.join(_NAMES)})>")
_PLAIN, _LAST = "Options", ("Output", "What is shown")


def first_sentence(command: Any) -> str:
    """What a command does, for the list of them: the first paragraph of its docstring."""
    return " ".join((command.__doc__ or "").strip().split("\n\n")[0].split())


class Command(TyperCommand):
    """A command whose help is in groups."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """What it takes: `moe-compose prune SOURCE OUTPUT [OPTIONS]`."""
        words = [_argument(p) for p in self.params if p.param_type_name == "argument"]
        for p in self.params:
            if p.param_type_name == "option" and p.required:
                words.append(f"{p.opts[0]} {p.metavar}")
        head = f"Usage: {ctx.command_path} "
        text = " ".join([*words, "[OPTIONS]"])
        formatter.write(_wrapped(text, formatter.width, head, " " * len(head)) + "\n")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The docstring."""
        _paragraphs(self.help or "", formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then a group of flags for each panel."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], _PLAIN: []}
        for p in self.get_params(ctx):
            if p.param_type_name == "argument":
                groups["Arguments"].append((_argument(p), getattr(p, "help", "")))
            elif (record := p.get_help_record(ctx)) is not None:
                own = _LAST[1] if p.name == "help" else _PLAIN
                row = (_TYPE.sub(lambda found: _NAMES[found[1]], record[0]), record[1])
                groups.setdefault(getattr(p, "rich_help_panel", None) or own, []).append(row)
        names = [n for n in groups if n not in _LAST] + [n for n in _LAST if n in groups]
        for name in names:
            _section(name, groups[name], formatter)


class Commands(TyperGroup):
    """The commands, in groups."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The docstring."""
        _paragraphs(self.help or "", formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Name and first sentence of each."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = getattr(command, "rich_help_panel", None) or "Commands"
            groups.setdefault(panel, []).append((name, command.short_help or ""))
        column = max(len(name) for name in self.commands)
        for panel, rows in groups.items():
            _section(panel, [(f"{name:{column}}", said) for name, said in rows], formatter)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _paragraphs(text: str, formatter: Any) -> None:
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        formatter.write(f"\n{_wrapped(' '.join(paragraph.split()), formatter.width, '  ')}\n")


def _section(name: str, rows: Sequence[tuple[str, str]], formatter: Any) -> None:
    """A heading, and under it names beside what they mean; a long name has its line alone."""
    if not rows:
        return
    column = max((len(n) for n, _ in rows if len(n) <= _COLUMN), default=_COLUMN)
    formatter.write(f"\n{name}:\n")
    for flag, said in rows:
        room = " " * (column + 4)
        first = f"  {flag:{column}}  "
        if len(flag) > column:
            formatter.write(f"  {flag}\n")
            first = room
        formatter.write(_wrapped(said, formatter.width, first, room) + "\n")


def _wrapped(text: str, width: int, first: str, rest: str | None = None) -> str:
    """Lines of at most `width`, broken at spaces only."""
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
