"""Flags about recovery and its text, shared by the commands that refit."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_compose.recovery.options import RefitOptions

_PANEL = "Recovery"

#: By default.
TOKENS = RefitOptions().tokens

Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="Refit the down-projections of the experts that stay, by least squares, to what each "
        "layer returned before; no training. Needs text.",
        rich_help_panel=_PANEL,
    ),
]
RefitOn = Annotated[
    list[str],
    typer.Option(
        "--refit-on",
        metavar="[NAME=]FILE",
        help="Text to refit to, by domain or not; again for more. Not the text that the result is "
        "judged on.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
RefitTokens = Annotated[
    int,
    typer.Option(
        "--refit-tokens",
        metavar="INT",
        help="Tokens to refit to; those kept of each layer take memory.",
        rich_help_panel=_PANEL,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="FLOAT",
        help="Largest mean KL to the original on held-out text (--data, --domain), in nats per "
        "token.",
        show_default=False,
    ),
]


def refit_given(refit: bool, refit_on: list[str], refit_tokens: int) -> dict[str, Any]:
    """These flags as what a step reads; tokens only where they were asked for."""
    tokens = refit_tokens if refit_tokens != TOKENS else None
    return {"refit": refit, "refit_on": refit_on, "refit_tokens": tokens}
