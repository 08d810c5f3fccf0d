"""`moe-compose inspect`: what a checkpoint is, from its config and headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..output import out
from ..parameters import Json, Quiet

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint


Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="STATS",
        help="Also show what moe-compose calibrate measured on it.",
        show_default=False,
    ),
]


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, or a model of the Hub: org/name@revision."
        ),
    ],
    stats: Stats = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a checkpoint: family, experts, routing, parameters, memory, surgery history. Reads no
    weights.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.reporting.inspect import inspect

    from ..screens import inspection_screen

    checkpoint = Checkpoint.open(source, headers_only=True)
    found = inspect(checkpoint)
    measured = None if stats is None else _measured(checkpoint, stats)
    out.show(inspection_screen(found))
    active = found.parameters.active if found.parameters else found.total
    line = f"{found.checkpoint}\t{found.model_type}\t{found.kind}\t{found.total}\t{active}"
    document = found.to_json()
    if measured is not None:
        from moe_compose.calibration.summary import to_json

        from ..stats_screen import load_screen, stats_screen

        out.show("")
        out.show(stats_screen(measured))
        out.show("")
        out.show(load_screen(measured))
        document = {**document, "stats": to_json(measured)}
    out.result(document, line)


def _measured(checkpoint: Checkpoint, folder: Path) -> ExpertStats:
    """Statistics of this checkpoint, and no other."""
    from moe_compose.calibration.stats import ExpertStats

    return ExpertStats.load(folder).check(checkpoint)
