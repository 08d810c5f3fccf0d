"""`moe-compose ls`: what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Quiet


class What(StrEnum):
    """What can be listed."""

    architectures = "architectures"
    methods = "methods"


def ls(
    what: Annotated[What, typer.Argument(help="architectures or methods.", show_choices=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List model families that are known, or methods of upcycling, composing, pruning, merging."""
    from moe_compose.reporting.catalogue import families, methods

    from ..screens import families_screen, methods_screen

    out.configure(as_json=as_json, quiet=quiet)
    if what is What.architectures:
        known = families()
        out.show(families_screen(known))
        out.result([asdict(row) for row in known], "\n".join(row.family for row in known))
    else:
        ways = methods()
        out.show(methods_screen(ways))
        out.result([asdict(row) for row in ways], "\n".join(row.method for row in ways))
