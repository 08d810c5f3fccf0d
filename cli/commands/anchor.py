"""`moe-compose anchor`: the pair of experts that one domain is trained in."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_compose.surgery.expert_options import AnchorOptions

from ..parameters import Output, with_options
from ._steps import step
from ._surgery import How, carry_out
from ._writing import with_writing

Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help="A dense checkpoint: a folder, or org/name@revision."),
]


@with_writing()
@with_options(AnchorOptions)
def anchor(source: Base, output: Output, options: AnchorOptions, how: How) -> None:
    """Make the pair that an expert is trained in: a frozen anchor, and its trainable copy.

    freeze.json beside the result says what trains in which stage, and
    moe_compose.training.freeze(model, stage) does it. compose --preset bar or flexolmo takes the
    trained pairs. Exit code 3: written, but not what was stated.
    """
    carry_out(source, output, how, step("anchor", options, {}, how))
