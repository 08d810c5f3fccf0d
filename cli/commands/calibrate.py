"""`moe-compose calibrate`: what each expert does on text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.calibration.options import CalibrateOptions

from ..output import out
from ..parameters import Domains, Json, Model, Overwrite, Quiet, Texts, with_options
from ..processes import joined, together

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

Stats = Annotated[Path, typer.Argument(metavar="STATS", help="A new folder for the statistics.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the layers that are finished.")]


@with_options(CalibrateOptions)
def calibrate(
    source: Model,
    stats: Stats,
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
    out.configure(as_json=as_json, quiet=quiet)
    with joined() as first:
        if not first:
            out.configure(quiet=True)
        found = _calibrate(source, stats, options, domains, data, resume, overwrite)
    if not first:
        return
    from moe_compose.calibration.summary import to_json

    from ..stats_screen import stats_screen

    out.show(stats_screen(found))
    here, there = shlex.quote(source), shlex.quote(str(stats))
    out.hint(f"See who gets the tokens:\n  moe-compose inspect {here} --stats {there}")
    fewer = f"moe-compose prune {here} OUTPUT --stats {there} --ratio 0.25"
    out.hint(f"Remove a quarter of the experts:\n  {fewer}")
    out.result(to_json(found) if as_json else {}, str(stats))


def _calibrate(
    source: str,
    stats: Path,
    options: CalibrateOptions,
    domains: list[str],
    data: list[str],
    resume: bool,
    overwrite: bool,
) -> ExpertStats:
    from moe_compose.calibration.data import parse_domains, read_domains
    from moe_compose.calibration.resume import check_place
    from moe_compose.checkpoint.reader import Checkpoint

    with together() as first:  # what is wrong is said before torch is there
        options.check()
        if first:
            check_place(stats, resume=resume, overwrite=overwrite)
        texts = read_domains(parse_domains(domains, data))
        checkpoint = Checkpoint.open(source)
    from moe_compose.calibration.calibrate import calibrate

    out.interrupted = "Finished layers are kept: the same command with --resume continues."
    with out.counting(f"measuring {checkpoint.label}", "tokens × layers") as count:
        found = calibrate(
            checkpoint,
            texts,
            options,
            output=stats,
            resume=resume,
            overwrite=overwrite,
            progress=count and (lambda p: count(p.done, p.total)),
        )
    out.interrupted = ""
    return found
