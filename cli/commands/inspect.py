"""`moe-compose inspect`: what a checkpoint is, from its config and headers."""

from __future__ import annotations

from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Quiet


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder, or a model of the Hub: org/name@revision."
        ),
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a checkpoint: family, experts, routing, parameters, memory. Reads no weights."""
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.reporting.inspect import inspect

    from ..screens import inspection_screen

    found = inspect(Checkpoint.open(source, headers_only=True))
    out.show(inspection_screen(found))
    active = found.parameters.active if found.parameters else found.total
    line = f"{found.checkpoint}\t{found.model_type}\t{found.kind}\t{found.total}\t{active}"
    out.result(found.to_json(), line)
