"""Flags about router rows that follow from text, shared by the commands that place experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.composition.options import RoutingOptions

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain

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


def texts_by_name(words: Sequence[str], unnamed: str | None) -> Mapping[str, tuple[Domain, ...]]:
    """Texts by expert, read.

    Args:
        words: `NAME=FILE`, or `FILE`.
        unnamed: the expert that a lone file is about; None: there is none.

    Raises:
        OptionError: a word that means nothing, or unreadable text.
    """
    from moe_compose.errors import OptionError
    from moe_compose.recipe.inputs import by_name

    lone = [w for w in words if "=" not in w]
    if lone and unnamed is None:
        raise OptionError(f"--data {lone[0]}: say whose text it is (NAME={lone[0]})")
    return by_name(tuple(words), unnamed)
