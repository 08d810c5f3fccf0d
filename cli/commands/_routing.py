"""Flags about router rows that follow from text, shared by the commands that place experts."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_compose.composition.options import RoutingOptions

_PANEL = "Routers from text"
_DEFAULT = RoutingOptions()

TEXT_TOKENS = _DEFAULT.tokens
TOLERANCE = _DEFAULT.tolerance
DEVICE = _DEFAULT.device

ExpertTexts = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[NAME=]FILE",
        help="Text of the expert NAME; again for more files, and for more experts. Where one is "
        "added or swapped in, text without a name is that one's.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
TextTokens = Annotated[
    int,
    typer.Option(
        "--text-tokens",
        metavar="INT",
        help="Tokens of each expert's text.",
        rich_help_panel=_PANEL,
    ),
]
RowScale = Annotated[
    float | None,
    typer.Option(
        "--row-scale",
        metavar="FLOAT",
        help="Length of router rows; by default searched on text that is held out.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance",
        metavar="FLOAT",
        help="Nats that the loss of the other domains (--data NAME=FILE) may rise by when an "
        "expert is added.",
        rich_help_panel=_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="TEXT",
        help="Where text is run: cpu, cuda, cuda:1.",
        rich_help_panel=_PANEL,
    ),
]
