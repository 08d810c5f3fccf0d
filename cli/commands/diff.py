"""`moe-compose diff`: what changed between two checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Quiet

Before = Annotated[
    str, typer.Argument(metavar="BEFORE", help="A checkpoint's folder, or its name on the Hub.")
]
After = Annotated[str, typer.Argument(metavar="AFTER", help="The one to compare it with.")]
ExitCode = Annotated[
    bool, typer.Option("--exit-code", help="Exit with 3 if anything differs, as validate does.")
]


def diff(
    before: Before,
    after: After,
    exit_code: ExitCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what changed: config, experts by layer, router rows, other tensors, files.

    Every tensor is hashed, and compared expert by expert: the same bytes, the same bytes under
    another index, changed and by how much, added, removed. Model card and surgery history are not
    compared. Exit code 0 whether they differ or not, unless --exit-code is given.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.reporting.diff import diff as compare

    from ..diff_screen import diff_screen

    sides = Checkpoint.open(before), Checkpoint.open(after)
    with out.counting("comparing") as count:
        found = compare(*sides, progress=count)
    out.show(diff_screen(found))
    out.result(found.to_json(), "same" if found.same else "different")
    if exit_code and not found.same:
        raise typer.Exit(3)
