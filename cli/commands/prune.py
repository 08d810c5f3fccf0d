"""`moe-compose prune`: a mixture of fewer experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.surgery.prune_options import PruneOptions

from ..parameters import Domains, Moe, Output, Texts, with_options
from ._refit import TOKENS, MaxKl, Refit, RefitOn, RefitTokens, refit_given
from ._steps import given_of, step
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_compose.surgery.plan import Plan

Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="FOLDER",
        help="What moe-compose calibrate measured on SOURCE; criteria aimer, random and given need "
        "none.",
        show_default=False,
    ),
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show why each removed expert goes (pruning.json has it too)."),
]


@with_writing(data=False)
@with_options(PruneOptions)
def prune(
    source: Moe,
    output: Output,
    options: PruneOptions,
    how: How,
    stats: Stats = None,
    explain: Explain = False,
    max_kl: MaxKl = None,
    refit: Refit = False,
    refit_on: RefitOn = [],  # noqa: B006 - typer's way of saying "none"
    refit_tokens: RefitTokens = TOKENS,
    domains: Domains = [],  # noqa: B006
    data: Texts = [],  # noqa: B006
) -> None:
    """Remove the experts that matter least from a mixture of experts.

    The result is exactly the source with those experts masked, which is measured after writing;
    what is kept, and why not the rest, is in pruning.json beside it. With --refit the experts that
    stay also make up for those that went. With --max-kl the count is found by bisection on
    held-out text (--data, --domain). Exit code 3: written, but not what was stated.
    """
    from moe_compose.recipe.recovery import compared_on, recovers

    given = given_of(
        "prune",
        stats=stats,
        max_kl=max_kl,
        **refit_given(refit, refit_on, refit_tokens),
        domain=domains,
        data=data,
    )
    how = replace(how, data=compared_on(given))

    def more(plan: Plan) -> RenderableType:
        from rich.console import Group

        from ..prune_screen import explain_screen
        from ..recovery_screen import recovery_screen

        return Group(*([explain_screen(plan)] if explain else []), recovery_screen(plan))

    make = step("prune", options, given, how)
    carry_out(source, output, how, make, more if explain or recovers(given) else None)
