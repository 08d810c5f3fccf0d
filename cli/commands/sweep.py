"""`moe-compose sweep`: quality against size of pruned models that are never written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.recipe.values import attribute_docs
from moe_compose.tradeoff.options import SweepOptions

from ..output import out
from ..parameters import Domains, Json, Moe, Overwrite, Quiet, Texts, with_options
from ._recipe import with_recipe
from ._refit import TOKENS, MaxKl, Refit, RefitOn, RefitTokens, refit_given
from ._steps import find, given_of

if TYPE_CHECKING:
    from moe_compose.tradeoff.result import Sweep

_DOCS = attribute_docs(SweepOptions)

Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="FOLDER",
        help="What moe-compose calibrate measured on SOURCE.",
        show_default=False,
    ),
]
Ratios = Annotated[
    str, typer.Option("--ratios", metavar="LIST", help=f"{_DOCS['ratios']} 0.25,0.5,...")
]
Criteria = Annotated[
    str, typer.Option("--criteria", metavar="LIST", help=f"{_DOCS['criteria']} reap,easy-ep,...")
]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE.json", help="Keep the figures here.", show_default=False),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.png",
        help="Draw KL against size: .png, .svg or .pdf; needs matplotlib.",
        show_default=False,
    ),
]


@with_recipe
@with_options(EvaluateOptions, without=("greedy",))
def sweep(
    source: Moe,
    options: EvaluateOptions,
    stats: Stats = None,
    domains: Domains = [],  # noqa: B006 - typer's way of saying "none"
    data: Texts = [],  # noqa: B006
    ratios: Ratios = "0.125,0.25,0.5",
    criteria: Criteria = "reap,easy-ep,frequency",
    max_kl: MaxKl = None,
    refit: Refit = False,
    refit_on: RefitOn = [],  # noqa: B006
    refit_tokens: RefitTokens = TOKENS,
    out_file: OutFile = None,
    picture: Picture = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate pruned models of several criteria and sizes on held-out text; write none of them.

    Names the knee, where giving up more experts begins to cost more, and with --max-kl the smallest
    candidate within it. Criterion random is always measured too: a criterion that does no better
    has measured nothing.
    """
    given = given_of(
        "sweep",
        stats=stats,
        domain=domains,
        data=data,
        ratios=ratios,
        criteria=criteria,
        max_kl=max_kl,
        **refit_given(refit, refit_on, refit_tokens),
        out=out_file,
        plot=picture,
    )
    found: Sweep = find("sweep", source, options, given, overwrite=overwrite)
    from ..recovery_screen import sweep_screen

    out.show(sweep_screen(found))
    best = found.chosen or found.knee
    line = "" if best is None else f"{best.criterion} {best.keep} {best.kl:.6e}"
    out.result(found.to_json(), line)
