"""`moe-compose run`: a recipe carried out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..output import out
from ..parameters import Json, Overwrite, Quiet, Resume

if TYPE_CHECKING:
    from moe_compose.errors import MoeComposeError
    from moe_compose.recipe.reading import Recipe
    from moe_compose.recipe.state import Written

File = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set an entry, such as steps.0.top_k=4; again for more.",
        show_default=False,
    ),
]
Dry = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Rehearse it: show every step and what it would make; write nothing."
    ),
]
Schema = Annotated[
    bool,
    typer.Option("--schema", help="Print the JSON schema of recipes, for editors, and stop."),
]


def run(
    recipe: File = None,
    change: Set = [],  # noqa: B006 - typer's way of saying "none"
    schema: Schema = False,
    dry_run: Dry = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: operations chained in a YAML file.

    All of it is rehearsed first, on headers alone, so that what is wrong with the last step is said
    before the first one takes long. Nothing is written between steps unless one says save. A step's
    assert holds its result to figures on held-out text; where one does not hold, the run ends with
    exit code 4. Exit code 2: a faulty recipe; 3: written, but not valid.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.errors import OptionError
    from moe_compose.recipe.reading import read_recipe

    if schema:
        from moe_compose.recipe.schema import schema as made

        out.text(json.dumps(made(), indent=2))
        return
    if recipe is None:
        raise OptionError("there is no recipe", hint="moe-compose run RECIPE.yaml")
    begun, found = time.monotonic(), read_recipe(recipe, change)
    if dry_run:
        _show(found, resume, overwrite)
        return
    written, findings, sound = _run(found, resume, overwrite)
    seconds = round(time.monotonic() - begun, 3)
    document = {**_document(found, written), "seconds": seconds, "found": findings}
    failed = _push(found, written, document)
    out.result(document, str(found.output or ""))
    if failed is not None:
        out.error(failed)
        raise typer.Exit(failed.exit_code)
    if not sound or any(w.report is not None and not w.report.ok for w in written):
        raise typer.Exit(3)


def _document(recipe: Recipe, written: list[Written]) -> dict[str, Any]:
    """What was done, for programs."""
    return {
        "output": None if recipe.output is None else str(recipe.output),
        "steps": [step.operation for step in recipe.steps],
        "written": [
            {
                "step": w.step,
                "folder": str(w.folder),
                "validation": w.report.to_json() if w.report else None,
            }
            for w in written
        ],
    }


def _show(recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """What it would do, and make."""
    from moe_compose.recipe.running import rehearse

    from ..recipe_screen import Rehearsed, recipe_screen

    watch = Rehearsed()
    with out.waiting("rehearsing: headers only, nothing is measured"):
        rehearse(recipe, resume=resume, overwrite=overwrite, watch=watch)
    out.show(recipe_screen(recipe, watch.plans))
    made = "" if recipe.output is None else f" The result would be {recipe.output}."
    out.hint(f"Dry run: nothing was run or written.{made}")
    out.result(watch.document(recipe), str(recipe.output or ""))


def _push(
    recipe: Recipe, written: list[Written], document: dict[str, Any]
) -> MoeComposeError | None:
    """The last result to the Hub; what is told of it, or why it is not there."""
    from moe_compose.errors import MoeComposeError
    from moe_compose.recipe.running import push_last

    from ._steps import Shown

    if recipe.push_to_hub is None:
        return None
    document["pushed"] = None
    try:
        document["pushed"] = push_last(recipe, written[-1], Shown()).pushed or None
    except MoeComposeError as error:
        return error
    return None


def _run(
    recipe: Recipe, resume: bool, overwrite: bool
) -> tuple[list[Written], list[dict[str, Any]], bool]:
    """What was written, what was found, and whether all losses are finite."""
    from moe_compose.recipe.running import run_recipe

    from ..recipe_screen import Followed

    watch = Followed(recipe)
    out.interrupted = "What was saved is kept: the same command with --resume continues."
    written = run_recipe(recipe, resume=resume, overwrite=overwrite, push=False, watch=watch)
    out.interrupted = ""
    return written, watch.findings, watch.sound
