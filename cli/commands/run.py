"""`moe-compose run`: a recipe carried out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..output import out
from ..parameters import Json, Overwrite, Quiet, Resume

if TYPE_CHECKING:
    from moe_compose.recipe.reading import Recipe
    from moe_compose.recipe.running import Event, Written

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
        "--dry-run", help="Check the recipe, and show what it would do; nothing is run or written."
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

    Nothing is written between steps unless one says save. A step's assert holds its result to
    figures on held-out text; where one does not hold, the run ends with exit code 1. Exit code 2:
    a faulty recipe; 3: written, but not valid.
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
        _show(found)
        return
    written = _run(found, resume, overwrite)
    document = {
        "output": str(found.output),
        "seconds": round(time.monotonic() - begun, 3),
        "steps": [step.operation for step in found.steps],
        "written": [
            {
                "step": w.step,
                "folder": str(w.folder),
                "validation": w.report.to_json() if w.report else None,
            }
            for w in written
        ],
    }
    out.result(document, str(found.output))
    if any(w.report is not None and not w.report.ok for w in written):
        raise typer.Exit(3)


def _show(recipe: Recipe) -> None:
    """What it would do."""
    from dataclasses import asdict

    from moe_compose.reporting.documents import plain

    steps = [
        {
            "operation": s.operation,
            "options": plain(asdict(s.options)),
            "inputs": plain(dict(s.given)),
            "assert": plain(dict(s.conditions)),
        }
        for s in recipe.steps
    ]
    for i, step in enumerate(steps):
        out.text(f"{i}  {step['operation']}")
        for name in ("inputs", "options", "assert"):
            for key, value in step[name].items():
                if value not in (None, [], {}):
                    out.text(f"     {key}: {value}")
    out.hint(f"Dry run: nothing was run or written. The result would be {recipe.output}.")
    out.result({"dry_run": True, "steps": steps, "output": str(recipe.output)}, "")


def _run(recipe: Recipe, resume: bool, overwrite: bool) -> list[Written]:
    from moe_compose.recipe.running import run_recipe

    from ..plan_screen import plan_screen
    from ..screens import report_screen

    def tell(event: Event) -> None:
        step = recipe.steps[event.step]
        if event.plan is not None:
            where = step.given.get("save") or (
                recipe.output if event.step == len(recipe.steps) - 1 else "(next step)"
            )
            out.show(plan_screen(event.plan, str(where)))
        elif event.measured:
            out.show(f"✓ {event.measured}")
        elif event.written is not None:
            out.show(f"written: {event.written.folder}")
            if event.written.report is not None:
                out.show(report_screen(event.written.report))
        else:
            out.hint(f"step {event.step + 1} of {len(recipe.steps)}: {event.operation}")

    out.interrupted = "What was saved is kept: the same command with --resume continues."
    found = run_recipe(recipe, resume=resume, overwrite=overwrite, tell=tell)
    out.interrupted = ""
    return found
