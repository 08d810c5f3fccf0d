"""The flags of every command that writes a checkpoint, given to it as one `How`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compose.checkpoint.sharding import SHARD_SIZE

from ..output import out
from ..parameters import (
    Data,
    DryRun,
    Json,
    Overwrite,
    Quiet,
    Resume,
    ShardSize,
    Validate,
    with_parameters,
)
from ._recipe import SaveRecipe, write_recipe
from ._surgery import How

PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="Upload the result to the Hugging Face Hub, if it is valid.",
        show_default=False,
        rich_help_panel="Output",
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="Make the repository private, if it is new.", rich_help_panel="Output"
    ),
]

_FLAGS: dict[str, tuple[Any, Any]] = {
    "shard_size": (ShardSize, SHARD_SIZE),
    "dry_run": (DryRun, False),
    "resume": (Resume, False),
    "overwrite": (Overwrite, False),
    "validate": (Validate, True),
    "data": (Data, None),
    "push_to_hub": (PushToHub, None),
    "private": (Private, False),
    "save_recipe": (SaveRecipe, None),
    "as_json": (Json, False),
    "quiet": (Quiet, False),
}


def with_writing(*, data: bool = True) -> Callable[..., Callable[..., None]]:
    """Decorate a command so that its parameter `how` becomes the flags about writing.

    Args:
        data: there is a flag for the text that the result is compared on; without, `--data` may
            mean another.
    """
    flags = {n: flag for n, flag in _FLAGS.items() if data or n != "data"}
    parameters = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for n, (hint, default) in flags.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            own = {name: given.pop(name) for name in flags}
            out.configure(as_json=own.pop("as_json"), quiet=own.pop("quiet"))
            recipe, how = own.pop("save_recipe"), How(**{"data": None, **own})
            write_recipe(recipe, command.__name__, given, signature, _beside(how))
            command(**given, how=how)

        return with_parameters(run, command, "how", parameters)

    return decorate


def _beside(how: How) -> dict[str, Any]:
    """What a recipe has beside its steps, where it is not as usual."""
    usual = {n: default for n, (_, default) in _FLAGS.items()}
    names = ("validate", "data", "shard_size", "push_to_hub", "private")
    found = {n: getattr(how, n) for n in names if getattr(how, n) != usual[n]}
    return {n: str(v) if isinstance(v, Path) else v for n, v in found.items()}
