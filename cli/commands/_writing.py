"""The flags of every command that writes a checkpoint, given to it as one `How`; and its command
line as a recipe.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from moe_compose.checkpoint.writer import SHARD_SIZE

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
from ._surgery import How

SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE",
        help="Also write this command as a recipe, for moe-compose run.",
        show_default=False,
        rich_help_panel="Output",
    ),
]

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
            recipe, first = own.pop("save_recipe"), os.environ.get("RANK", "0") == "0"
            if recipe is not None and first:
                _save(recipe, command.__name__.replace("_", "-"), given, signature, own["validate"])
            command(**given, how=How(**{"data": None, **own}))

        return with_parameters(run, command, "how", parameters)

    return decorate


def _save(
    file: Path, name: str, given: Mapping[str, Any], signature: inspect.Signature, validate: bool
) -> None:
    """Write a command line as a recipe: what is not as it is by default, under its flags' names.

    Raises:
        OptionError: recipes cannot say this; or the file is there.
    """
    import yaml

    from moe_compose.errors import OptionError
    from moe_compose.recipe.reading import parse_recipe
    from moe_compose.reporting.documents import plain

    if file.exists():
        raise OptionError(f"--save-recipe ({file}) is there", hint="Give another name.")
    step: dict[str, Any] = {"operation": name}
    for key, parameter in signature.parameters.items():
        value = given.get(key, parameter.default)
        same = value == parameter.default or value in (None, [], False)
        if key not in ("output", "how", "explain") and not same:
            step[_key_of(key, parameter)] = plain(value)
    steps = [step]
    if step.pop("refit", False):
        tokens = {"tokens": step.pop("refit_tokens")} if "refit_tokens" in step else {}
        texts = step.pop("refit_on", None) or step.pop("data", None) or step.pop("domain", None)
        steps.append({"operation": "refit", "data": texts, **tokens})
    recipe: dict[str, Any] = {"steps": steps, "output": str(given["output"])}
    if not validate:
        recipe["validate"] = False
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    try:
        parse_recipe(text, file.name)
    except OptionError as e:
        raise OptionError("recipes cannot say this", problems=e.problems or [e.message]) from e
    file.write_text(text, encoding="utf-8")
    out.hint(f"The recipe is {file}: moe-compose run {file}")


def _key_of(name: str, parameter: inspect.Parameter) -> str:
    """A recipe's word for a parameter: its flag, or `source` for what is operated on."""
    for info in get_args(parameter.annotation)[1:]:
        if isinstance(info, typer.models.ArgumentInfo):
            return "source"
        declared = (info.default, *(info.param_decls or ()))
        flags = [d for d in declared if isinstance(d, str) and d.startswith("--")]
        if flags:
            return flags[0].partition("/")[0].removeprefix("--").replace("-", "_")
    return name
