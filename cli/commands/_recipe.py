"""A command line as a recipe."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..output import out
from ..parameters import with_parameters

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

#: Parameters that say how something is done or shown, not what.
_NOT_SAID = {"how", "explain", "resume", "overwrite", "as_json", "quiet"}


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that makes no model, so that it has `--save-recipe`."""
    signature = inspect.signature(command, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    flag = inspect.Parameter("save_recipe", kind, default=None, annotation=SaveRecipe)

    @functools.wraps(command)
    def run(save_recipe: Path | None, **given: Any) -> None:
        out.configure(as_json=given["as_json"], quiet=given["quiet"])
        write_recipe(save_recipe, command.__name__, given, signature)
        command(**given)

    last = signature.parameters["as_json"].replace(kind=kind)
    return with_parameters(run, command, last.name, [flag, last])


def write_recipe(
    file: Path | None,
    command: str,
    given: Mapping[str, Any],
    signature: inspect.Signature,
    top: Mapping[str, Any] | None = None,
) -> None:
    """Write a command line as a recipe: what is not as it is by default, under its flags' names.

    Args:
        file: where; None: nowhere.
        command: the command's function.
        given: parameter → value.
        signature: of the command.
        top: what goes beside the steps; None: the command makes no model.

    Raises:
        OptionError: recipes cannot say this; or the file is there.
    """
    if file is None or os.environ.get("RANK", "0") != "0":
        return
    import yaml

    from moe_compose.errors import OptionError
    from moe_compose.recipe.reading import parse_recipe
    from moe_compose.reporting.documents import plain

    if file.exists():
        raise OptionError(f"--save-recipe ({file}) is there", hint="Give another name.")
    step: dict[str, Any] = {"operation": command.replace("_", "-")}
    for name, parameter in signature.parameters.items():
        value = given.get(name, parameter.default)
        usual = value == parameter.default or value is None or value == []
        if not usual and name not in _NOT_SAID and not (name == "output" and top is not None):
            step[_key_of(name, parameter)] = plain(value)
    beside = {} if top is None else {"output": str(given["output"]), **top}
    recipe = {"steps": [step], **beside}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    try:
        parse_recipe(text, file.name)
    except OptionError as e:
        raise OptionError("recipes cannot say this", problems=e.problems or [e.message]) from e
    file.write_text(text, encoding="utf-8")
    out.hint(f"The recipe is {file}: moe-compose run {file}")


def _key_of(name: str, parameter: inspect.Parameter) -> str:
    """A recipe's word for a parameter: its flag, or its name where it is an argument."""
    for info in get_args(parameter.annotation)[1:]:
        if isinstance(info, typer.models.ArgumentInfo):
            return {"output": "save", "page": "out"}.get(name, name)
        declared = (info.default, *(info.param_decls or ()))
        flags = [d for d in declared if isinstance(d, str) and d.startswith("--")]
        if flags:
            return flags[0].partition("/")[0].removeprefix("--").replace("-", "_")
    return name
