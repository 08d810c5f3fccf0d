"""`moe-compose sweep`: quality against size of pruned models that are never written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.recipe.values import attribute_docs
from moe_compose.recovery.options import RefitOptions
from moe_compose.tradeoff.options import SweepOptions

from ..output import out
from ..parameters import Domains, Json, Moe, Overwrite, Quiet, Texts, with_options
from ._refit import TOKENS, MaxKl, Refit, RefitOn, RefitTokens, read_words

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


@with_options(EvaluateOptions)
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
    out.configure(as_json=as_json, quiet=quiet)
    asked = SweepOptions(
        ratios=_numbers(ratios),
        criteria=cast(Any, tuple(filter(None, criteria.split(",")))),
        max_kl=max_kl,
        seed=options.seed,
    )
    how = RefitOptions(tokens=refit_tokens) if refit else None
    _check_files(out_file, picture, overwrite, refit, refit_on)
    found = _sweep(source, stats, parse(domains, data), asked, options, how, refit_on)
    _keep(found, out_file, picture)
    from ..recovery_screen import sweep_screen

    out.show(sweep_screen(found))
    best = found.chosen or found.knee
    line = "" if best is None else f"{best.criterion} {best.keep} {best.kl:.6e}"
    out.result(found.to_json(), line)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word)
    except ValueError as e:
        raise typer.BadParameter(f"--ratios {text!r} is no list such as 0.125,0.25,0.5") from e


def parse(domains: list[str], data: list[str]) -> dict[str, list[str]]:
    """The held-out text, by domain."""
    from moe_compose.calibration.data import parse_domains

    return parse_domains(domains, data)


def _check_files(
    out_file: Path | None, picture: Path | None, overwrite: bool, refit: bool, words: list[str]
) -> None:
    """What cannot be written shall not come out after hours of evaluation."""
    from moe_compose.errors import OptionError, WriteError
    from moe_compose.reporting.sweep_plot import check_picture

    if words and not refit:
        raise OptionError("--refit-on has no meaning without --refit")
    for path in filter(None, (out_file, picture)):
        if not path.absolute().parent.is_dir():
            raise OptionError(f"{path} lies in a folder that does not exist")
        if path.exists() and not overwrite:
            raise WriteError(f"{path} is there already", hint="Replace it with --overwrite.")
    if picture is not None:
        check_picture(picture)


def _sweep(
    source: str,
    stats: Path | None,
    texts: dict[str, list[str]],
    asked: SweepOptions,
    options: EvaluateOptions,
    refit: RefitOptions | None,
    refit_on: list[str],
) -> Sweep:
    from moe_compose.calibration.data import read_domains
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.tradeoff.sweep import sweep as run

    held, fitted = read_domains(texts), read_words(refit_on)
    checkpoint, found = Checkpoint.open(source), None
    if stats is not None:
        from moe_compose.calibration.pruning import check_statistics
        from moe_compose.calibration.stats import ExpertStats

        found = ExpertStats.load(stats)
        check_statistics(found, checkpoint)
    with out.counting(f"evaluating candidates of {checkpoint.label}", "candidates") as progress:
        return run(
            checkpoint,
            found,
            held,
            asked,
            evaluation=options,
            refit=refit,
            refit_on=fitted,
            progress=progress,
        )


def _keep(found: Sweep, out_file: Path | None, picture: Path | None) -> None:
    from moe_compose.checkpoint.copying import write_file
    from moe_compose.reporting.documents import encode
    from moe_compose.reporting.sweep_plot import draw_sweep

    if out_file is not None:
        write_file(out_file, encode(found.to_json()))
    if picture is not None:
        draw_sweep(found, picture)
