"""`moe-compose plot`: statistics of experts as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Overwrite, Quiet

Stats = Annotated[
    Path, typer.Argument(metavar="STATS", help="A folder that moe-compose calibrate wrote.")
]
Picture = Annotated[
    Path, typer.Argument(metavar="OUT", help="A new file: .png, .svg, .pdf, or .html.")
]
Layer = Annotated[
    int | None,
    typer.Option(
        "--layer",
        metavar="INT",
        help="Layer whose experts' similarity is shown; by default the middle one.",
        show_default=False,
    ),
]


def plot(
    stats: Stats,
    picture: Picture,
    layer: Layer = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw load by layer and expert, specialisation by domain, and how alike experts are.

    Needs matplotlib, and scipy for the tree of similarities: pip install 'moe-compose[plot]'.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.reporting.plots import draw

    with out.waiting(f"drawing {picture.name}"):
        draw(ExpertStats.load(stats), picture, layer=layer, overwrite=overwrite)
    out.hint(f"The picture is {picture}.")
    out.result({"picture": str(picture)}, str(picture))
