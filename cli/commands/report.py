"""`moe-compose report`: a checkpoint on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Model, Overwrite, Quiet

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


def report(
    source: Model,
    path: Page,
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
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.errors import CheckpointError
    from moe_compose.reporting.report import write_report
    from moe_compose.surgery.history import read_json

    checkpoint = Checkpoint.open(source, headers_only=True)
    found = None if sweep is None else read_json(sweep, sweep.parent.name)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{sweep} is no sweep", hint="Give the file that sweep --out wrote.")
    measured = None
    if stats is not None:
        from moe_compose.calibration.stats import ExpertStats

        measured = ExpertStats.load(stats)
    write_report(checkpoint, path, stats=measured, sweep=found, overwrite=overwrite)
    out.result({"page": str(path)}, str(path))
    out.hint(f"{path} opens in any browser.")
