"""Flags about recovery and its text, shared by the commands that refit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.recovery.options import RefitOptions

from ..output import out

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.surgery.plan import Plan

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


@dataclass(frozen=True, slots=True)
class Recovery:
    """Flags that need text."""

    max_kl: float | None
    refit: bool
    refit_on: tuple[str, ...]
    tokens: int
    domains: tuple[str, ...]
    data: tuple[str, ...]

    @property
    def wanted(self) -> bool:
        """Whether any is given."""
        return self.refit or self.max_kl is not None

    @property
    def options(self) -> RefitOptions:
        """How it is done."""
        return RefitOptions(tokens=self.tokens)

    def check(self) -> None:
        """Which text is for what.

        Raises:
            OptionError: text that is missing, or has no use.
        """
        from moe_compose.errors import OptionError

        problems = []
        text = bool(self.domains or self.data)
        if self.refit_on and not self.refit:
            problems.append("--refit-on has no meaning without --refit")
        if self.max_kl is not None and not text:
            problems.append("--max-kl needs held-out text: --data FILE, or --domain NAME=FILE")
        if self.max_kl is not None and self.refit and not self.refit_on:
            problems.append("--refit with --max-kl needs text of its own: --refit-on FILE")
        if self.max_kl is None and self.refit and text == bool(self.refit_on):
            problems.append("--refit needs text: --refit-on FILE, or --data, or --domain; one")
        if not self.wanted and (self.domains or len(self.data) > 1):
            problems.append("without --refit and --max-kl one --data FILE is compared on")
        if problems:
            raise OptionError("these texts cannot be meant", problems=problems)

    def texts(self) -> tuple[tuple[Domain, ...] | None, tuple[Domain, ...] | None]:
        """Held-out text, and text to refit to."""
        from moe_compose.calibration.data import parse_domains, read_domains

        named = None
        if self.domains or self.data:
            named = read_domains(parse_domains(self.domains, self.data))
        fitted = read_words(self.refit_on)
        if self.max_kl is None and fitted is None:
            return None, named
        return named, fitted


def refitted(
    plan: Plan, original: Checkpoint, texts: Sequence[Domain], options: RefitOptions
) -> Plan:
    """The plan with down-projections refitted on text, progress shown."""
    from moe_compose.recovery.refit import refit

    with out.counting("refitting", "layers") as progress:
        return refit(plan, original, texts, options, progress=progress)


def read_words(words: Sequence[str]) -> tuple[Domain, ...] | None:
    """Texts that were given as `FILE` or `NAME=FILE`; None where there are none."""
    from moe_compose.calibration.data import read_texts

    return read_texts(*words) if words else None
