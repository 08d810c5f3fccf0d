"""`moe-compose pack-expert`: one expert as a small checkpoint of its own."""

from __future__ import annotations

import shlex
import time
from typing import Annotated

import typer

from ..output import out
from ..parameters import Json, Model, Output, Overwrite, Quiet
from ._recipe import with_recipe
from ._routing import DEVICE, TEXT_TOKENS, Device, TextTokens
from ._steps import find, given_of

Expert = Annotated[
    str | None,
    typer.Option("--expert", help="Of a mixture: which, by name or number.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Of a dense SOURCE: the model that it was trained from.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What the expert is called.", show_default=False),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Of a dense SOURCE: the MoE family that the expert is for; by default the most "
        "portable one.",
        show_default=False,
    ),
]
Text = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="FILE",
        help="Text of the expert, of which only statistics go along; again for more files.",
        show_default=False,
    ),
]


@with_recipe
def pack_expert(
    source: Model,
    output: Output,
    expert: Expert = None,
    base: Base = None,
    name: Name = None,
    target: Target = None,
    data: Text = [],  # noqa: B006 - typer's way of saying "none"
    text_tokens: TextTokens = TEXT_TOKENS,
    device: Device = DEVICE,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack one expert, to be sent to somebody who has the base.

    The artifact holds its tensors, its router rows, statistics of its text if text is given, and a
    digest of the base, which add-expert --from and swap-expert --from check. It holds no text.
    """
    begun = time.monotonic()
    given = given_of(
        "pack-expert",
        expert=expert,
        base=base,
        name=name,
        target=target,
        data=data,
        text_tokens=text_tokens,
        device=device,
        save=output,
    )
    plan = find("pack-expert", source, None, given, overwrite=overwrite)
    from ..pack_screen import pack_screen, packed

    out.show(pack_screen(plan))
    here = shlex.quote(str(output))
    out.hint(
        f"Whoever has the base adds it with:\n  moe-compose add-expert MOE OUTPUT --from {here}"
    )
    seconds = round(time.monotonic() - begun, 3)
    out.result({**packed(plan), "output": str(output), "seconds": seconds}, str(output))
