"""`moe-compose calibrate`: what each expert does on text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.calibration.options import CalibrateOptions
from moe_compose.recipe.state import State

from ..output import out
from ..parameters import Domains, Json, Model, Overwrite, Quiet, Texts, with_options
from ..processes import joined, together
from ._recipe import with_recipe
from ._steps import Shown, given_of

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

Stats = Annotated[Path, typer.Argument(metavar="STATS", help="A new folder for the statistics.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the layers that are finished.")]


@with_recipe
@with_options(CalibrateOptions)
def calibrate(
    source: Model,
    output: Stats,
    options: CalibrateOptions,
    domains: Domains = [],  # noqa: B006 - typer's way of saying "none"
    data: Texts = [],  # noqa: B006
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each expert does on text: load, gates, output norms, by layer and domain.

    The model is streamed a layer at a time, so it may be far larger than memory. Pruning and
    merging take the statistics; one calibration serves every criterion and ratio.

    Several devices or hosts: torchrun --nproc-per-node N -m moe_compose_cli calibrate ... gives
    each process its part of the text.
    """
    with joined() as first:
        if not first:
            out.configure(quiet=True)
        found = _calibrate(source, output, options, domains, data, resume, overwrite)
    if not first:
        return
    from moe_compose.calibration.summary import to_json

    from ..stats_screen import stats_screen

    out.show(stats_screen(found))
    here, there = shlex.quote(source), shlex.quote(str(output))
    out.hint(f"See who gets the tokens:\n  moe-compose inspect {here} --stats {there}")
    fewer = f"moe-compose prune {here} OUTPUT --stats {there} --ratio 0.25"
    out.hint(f"Remove a quarter of the experts:\n  {fewer}")
    out.result(to_json(found) if as_json else {}, str(output))


def _calibrate(
    source: str,
    stats: Path,
    options: CalibrateOptions,
    domains: list[str],
    data: list[str],
    resume: bool,
    overwrite: bool,
) -> ExpertStats:
    from moe_compose.calibration.resume import check_place
    from moe_compose.recipe.acts import texts_of
    from moe_compose.recipe.findings import measured

    given = given_of("calibrate", domain=domains, data=data)
    state = State(resume=resume, overwrite=overwrite, watch=Shown())
    with together() as first:  # what is wrong is said before torch is there
        options.check()
        if first:
            check_place(stats, resume=resume, overwrite=overwrite)
        texts, checkpoint = texts_of(given), state.open(source)
    out.interrupted = "Finished layers are kept: the same command with --resume continues."
    found = measured(state, stats, checkpoint, texts, options)
    out.interrupted = ""
    return found
