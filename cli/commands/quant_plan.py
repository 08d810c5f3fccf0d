"""`moe-compose quant-plan`: how many bits each expert needs, as a recipe for a quantiser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_compose.calibration.quant_options import QuantPlanOptions

from ..output import out
from ..parameters import Json, Moe, Overwrite, Quiet, with_options
from ._recipe import with_recipe
from ._steps import find, given_of

Stats = Annotated[
    Path, typer.Argument(metavar="STATS", help="What moe-compose calibrate measured on SOURCE.")
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Write quant-plan.json and recipe.yaml here; without it they are only shown.",
        show_default=False,
    ),
]


@with_recipe
@with_options(QuantPlanOptions)
def quant_plan(
    source: Moe,
    stats: Stats,
    options: QuantPlanOptions,
    out_folder: OutFolder = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plan fewer bits for experts that do little, as a recipe for llm-compressor.

    The least sensitive experts get --bits-low, the others --bits-high. Nothing is quantised here;
    recipe.yaml says on top how to run it.
    """
    from moe_compose.reporting.quant_recipe import RECIPE_NAME

    from ..quant_screen import quant_screen

    given = given_of("quant-plan", stats=stats, out=out_folder)
    plan = find("quant-plan", source, options, given, overwrite=overwrite, headers_only=True)
    out.show(quant_screen(plan))
    written = f"{out_folder / RECIPE_NAME}" if out_folder is not None else ""
    out.result(plan.to_json(), written or f"{plan.mean_bits:.3f}")
    if written:
        out.hint(f"{written} is ready for llm-compressor: pip install llmcompressor")
