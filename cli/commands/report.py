"""`moe-compose report`: a checkpoint on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Model, Overwrite, Quiet
from ._recipe import with_recipe
from ._steps import find, given_of

Page = Annotated[Path, typer.Argument(metavar="OUT.html", help="A new file.")]
Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="STATS",
        help="Also show what moe-compose calibrate measured on it.",
        show_default=False,
    ),
]
SweepFile = Annotated[
    Path | None,
    typer.Option(
        "--sweep",
        metavar="FILE.json",
        help="Also show what moe-compose sweep --out found.",
        show_default=False,
    ),
]


@with_recipe
def report(
    source: Model,
    page: Page,
    stats: Stats = None,
    sweep: SweepFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page: architecture, routing load, surgery history, receipts, figures.

    What lies beside the checkpoint is shown if it is there: validation.json, pruning.json,
    merging.json, refit.json, routing_search.json, training.json. The page loads nothing from
    anywhere. Reads no weights.
    """
    given = given_of("report", out=page, stats=stats, sweep=sweep)
    find("report", source, None, given, overwrite=overwrite, headers_only=True)
    out.result({"page": str(page)}, str(page))
    out.hint(f"{page} opens in any browser.")
