"""From an options dataclass to the flags of a command, and the flags that all commands share.

An operation's options are described once, in the docstring of their dataclass: field, keyword,
recipe key and flag have one name, and the help is the text under `Attributes:`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from moe_compose.recipe.values import attribute_docs
from moe_compose.reporting.units import parse_bytes

_METAVARS = {int: "INT", float: "FLOAT"}


def flag_of(name: str) -> str:
    """`num_experts` → `--num-experts`."""
    return f"--{name.replace('_', '-')}"


def with_options(
    cls: type, parameter: str = "options", without: tuple[str, ...] = ()
) -> Callable[..., Callable[..., None]]:
    """Decorate a command so that its parameter `options` becomes one flag per field of `cls`.

    Args:
        cls: an options dataclass; the help of its flags is its docstring.
        parameter: name of the command's parameter that receives the instance.
        without: fields that mean nothing to the command, and stay as they are by default.
    """
    flags = {name: flag for name, flag in _flags(cls).items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in flags}
            lists = {n: tuple(v) for n, v in chosen.items() if isinstance(v, list)}
            command(**given, **{parameter: cls(**chosen | lists)})

        return with_parameters(run, command, parameter, list(flags.values()))

    return decorate


def with_parameters(
    run: Callable[..., None],
    command: Callable[..., None],
    parameter: str,
    flags: list[inspect.Parameter],
) -> Callable[..., None]:
    """`run` with the signature of `command`, but for one parameter that becomes flags, the last.

    Args:
        run: what typer calls.
        command: what it stands for.
        parameter: of `command`.
        flags: in its place.
    """
    given = inspect.signature(command, eval_str=True).parameters.values()
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in given if p.name != parameter]
    own += flags
    run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own}
    return run


def _flags(cls: type) -> Mapping[str, inspect.Parameter]:
    hints, docs = get_type_hints(cls), attribute_docs(cls)
    return {f.name: _flag(f, hints[f.name], docs[f.name]) for f in fields(cls)}


def _flag(field: Field[Any], hint: Any, doc: str) -> inspect.Parameter:
    """A field as a flag. A tuple of texts is a flag that may be repeated; one that is on unless
    told otherwise has a `--no-` beside it.
    """
    required = field.default is MISSING
    default: Any = inspect.Parameter.empty if required else field.default
    if get_origin(hint) is tuple:
        hint, default = list[str], default if required else list(default)
    kinds = [t for t in get_args(hint) if t is not types.NoneType] if _optional(hint) else [hint]
    flag = flag_of(field.name)
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if default is True else flag,
        help=doc,
        metavar=_METAVARS.get(kinds[0], "TEXT") if kinds[0] is not bool else None,
        show_default=not required and default not in (None, []),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, option],
    )


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and get_origin(hint) is not Literal


def size_in_bytes(size: str | int) -> int:
    """`5GB` as a flag's value."""
    try:
        return parse_bytes(size)
    except ValueError as e:
        raise typer.BadParameter(f"{size!r} is no {str(e).removeprefix('a ')}") from e


# Shared flags mean the same in every command.
_FILES, _SHOWN, _TEXT = "Output", "What is shown", "Text"

Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder for the result.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document on stdout, all else on stderr.",
        rich_help_panel=_SHOWN,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print only the line a script needs.", rich_help_panel=_SHOWN
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would be written, and whether there is room; write nothing.",
        rich_help_panel=_FILES,
    ),
]
ShardSize = Annotated[
    int,
    typer.Option(
        "--shard-size",
        parser=size_in_bytes,
        metavar="SIZE",
        help="Largest file of weights: 500MB, 2GB, or bytes; by default 5GB.",
        show_default=False,
        rich_help_panel=_FILES,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted write of the same plan.",
        rich_help_panel=_FILES,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=_FILES),
]
Validate = Annotated[
    bool,
    typer.Option(
        "--validate/--no-validate",
        help="Check the result, and compare it with its source on real text.",
        rich_help_panel=_FILES,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Text to compare on, UTF-8; by default a bundled sample.",
        show_default=False,
        rich_help_panel=_TEXT,
    ),
]
Domains = Annotated[
    list[str],
    typer.Option(
        "--domain",
        metavar="NAME=FILE",
        help="Text of one domain; again for more files, and for more domains.",
        show_default=False,
        rich_help_panel=_TEXT,
    ),
]
Texts = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="FILE",
        help="Text of no particular domain; again for more files.",
        show_default=False,
        rich_help_panel=_TEXT,
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint's folder, or its name on the Hub.")
]
Moe = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A mixture of experts: a folder, or org/name@revision."),
]
