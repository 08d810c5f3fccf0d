"""`moe-compose upcycle`: a dense checkpoint becomes a mixture of experts."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_compose.surgery.upcycle_options import UpcycleOptions

from ..parameters import Output, with_options
from ._steps import step
from ._surgery import How, carry_out
from ._writing import with_writing

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A dense checkpoint: a folder, or org/name@revision."),
]


@with_writing()
@with_options(UpcycleOptions)
def upcycle(source: Source, output: Output, options: UpcycleOptions, how: How) -> None:
    """Make a mixture of experts from a dense checkpoint.

    What the result will be, and how exact, is shown first; then it is written, checked, and
    compared with its source on real text. Exit code 3: written, but not what was stated.
    """
    carry_out(source, output, how, step("upcycle", options, {}, how))
