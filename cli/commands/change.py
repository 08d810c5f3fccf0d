"""`moe-compose add-expert`, `swap-expert`, `remove-expert` and `expand`: the experts of a mixture
that is there.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moe_compose.surgery.expert_options import AddOptions, ExpandOptions, RemoveOptions, SwapOptions

from ..parameters import Moe, Output, with_options
from ._routing import (
    DEVICE,
    TEXT_TOKENS,
    TOLERANCE,
    Device,
    ExpertTexts,
    RowScale,
    TextTokens,
    Tolerance,
)
from ._steps import given_of, step
from ._surgery import How, carry_out
from ._writing import with_writing

From = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="DONOR",
        help="Where the new expert comes from: a dense model, MOE#3 or MOE#law, a packed "
        "expert, an anchored pair, copy:3 (one of SOURCE itself), or any of these +ADAPTER (a LoRA "
        "folder).",
        show_default=False,
    ),
]


@with_writing(data=False)
@with_options(AddOptions)
def add_expert(
    source: Moe,
    output: Output,
    donor: From,
    options: AddOptions,
    how: How,
    data: ExpertTexts = [],  # noqa: B006 - typer's way of saying "none"
    text_tokens: TextTokens = TEXT_TOKENS,
    row_scale: RowScale = None,
    tolerance: Tolerance = TOLERANCE,
    device: Device = DEVICE,
) -> None:
    """Add an expert to a mixture, the last.

    The other experts and all that is shared keep their bytes. With text of the new expert, or
    statistics packed with it, its router row follows from that; with text of the other domains,
    the row is as long as leaves their loss within the tolerance. Exit code 3: written, but not what
    was stated.
    """
    routing = {"text_tokens": text_tokens, "row_scale": row_scale, "tolerance": tolerance}
    given = given_of("add-expert", from_=donor, data=data, device=device, **routing)
    carry_out(source, output, how, step("add-expert", options, given, how))


@with_writing(data=False)
@with_options(SwapOptions)
def swap_expert(
    source: Moe,
    output: Output,
    donor: From,
    options: SwapOptions,
    how: How,
    data: ExpertTexts = [],  # noqa: B006
    text_tokens: TextTokens = TEXT_TOKENS,
    row_scale: RowScale = None,
    tolerance: Tolerance = TOLERANCE,
    device: Device = DEVICE,
) -> None:
    """Put another expert in the place of one: the upgrade of BAR.

    All else keeps its bytes. Train the router afterwards, or let the row follow from text. Exit
    code 3: written, but not what was stated.
    """
    routing = {"text_tokens": text_tokens, "row_scale": row_scale, "tolerance": tolerance}
    given = given_of("swap-expert", from_=donor, data=data, device=device, **routing)
    carry_out(source, output, how, step("swap-expert", options, given, how))


@with_writing()
@with_options(RemoveOptions)
def remove_expert(source: Moe, output: Output, options: RemoveOptions, how: How) -> None:
    """Remove experts by name or number, and every trace of their text: opting out.

    The result is exactly the source with those experts masked, which is measured after writing.
    Exit code 3: written, but not what was stated.
    """
    carry_out(source, output, how, step("remove-expert", options, {}, how))


@with_writing()
@with_options(ExpandOptions)
def expand(source: Moe, output: Output, options: ExpandOptions, how: How) -> None:
    """Repeat every expert, to be trained apart; exact when top-k grows as well.

    Exit code 3: written, but not what was stated.
    """
    carry_out(source, output, how, step("expand", options, {}, how))
