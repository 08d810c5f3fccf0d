"""`moe-compose merge`: a mixture of fewer experts, means of those that are alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.calibration.options import CalibrateOptions
from moe_compose.surgery.merge_options import MergeOptions

from ..parameters import Moe, Output, with_options
from ._refit import TOKENS, Refit, RefitOn, RefitTokens, refit_given
from ._steps import given_of, step
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_compose.surgery.plan import Plan

#: How text is measured unless something else is asked for.
MEASURE = CalibrateOptions(similarity=True)

Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="FOLDER",
        help="What moe-compose calibrate --similarity measured on SOURCE; this or --domain.",
        show_default=False,
    ),
]
Domains = Annotated[
    list[str],
    typer.Option(
        "--domain",
        metavar="NAME=FILE",
        help="Text of one domain; again for more. Layers are merged in sequence, each measured "
        "on it behind the merged ones before it, as REAM's authors do; this or --stats.",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of that text in all.")]
Length = Annotated[int, typer.Option("--seq-len", help="Longest sequence of it, in tokens.")]
Sample = Annotated[
    int, typer.Option("--sample", help="Tokens of it on which experts are compared.")
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show what is merged with what (merging.json has it too)."),
]


@with_writing()
@with_options(MergeOptions)
def merge(
    source: Moe,
    output: Output,
    options: MergeOptions,
    how: How,
    stats: Stats = None,
    domains: Domains = [],  # noqa: B006 - typer's way of saying "none"
    tokens: Tokens = MEASURE.tokens,
    seq_len: Length = MEASURE.seq_len,
    sample: Sample = MEASURE.sample,
    explain: Explain = False,
    refit: Refit = False,
    refit_on: RefitOn = [],  # noqa: B006
    refit_tokens: RefitTokens = TOKENS,
) -> None:
    """Merge experts that are alike into weighted means of them.

    Needs scipy: pip install 'moe-compose[merge]'. With --stats, all layers are grouped by what the
    original model does; with --domain, each by what it does behind the merged ones before it.
    With --refit the merged experts also make up for what is lost. Groups and weights are in
    merging.json beside the result. Exit code 3: written, but not whole.
    """
    text = {"tokens": tokens, "seq_len": seq_len, "sample": sample}
    given = given_of(
        "merge",
        stats=stats,
        domain=domains,
        **refit_given(refit, refit_on, refit_tokens),
        **{name: value for name, value in text.items() if value != getattr(MEASURE, name)},
    )

    def more(plan: Plan) -> RenderableType:
        from rich.console import Group

        from ..merge_screen import groups_screen
        from ..recovery_screen import recovery_screen

        shown = [groups_screen(plan)] if explain else []
        return Group(*shown, *([recovery_screen(plan)] if refit else []))

    make = step("merge", options, given, how)
    carry_out(source, output, how, make, more if explain or refit else None)
