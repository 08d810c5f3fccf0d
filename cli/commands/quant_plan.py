"""`moe-compose quant-plan`: how many bits each expert needs, as a recipe for a quantiser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_compose.calibration.quant_options import QuantPlanOptions

from ..output import out
from ..parameters import Json, Moe, Overwrite, Quiet, with_options

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
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.calibration.quantisation import plan_quantisation
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.reporting.quant_recipe import RECIPE_NAME, write_quant_plan

    from ..quant_screen import quant_screen

    checkpoint = Checkpoint.open(source, headers_only=True)
    plan = plan_quantisation(checkpoint, ExpertStats.load(stats), options)
    if out_folder is not None:
        write_quant_plan(plan, out_folder, overwrite=overwrite)
    out.show(quant_screen(plan))
    written = f"{out_folder / RECIPE_NAME}" if out_folder is not None else ""
    out.result(plan.to_json(), written or f"{plan.mean_bits:.3f}")
    if written:
        out.hint(f"{written} is ready for llm-compressor: pip install llmcompressor")
