"""`moe-compose prune`: a mixture of fewer experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.checkpoint.writer import SHARD_SIZE
from moe_compose.surgery.prune_options import WITHOUT_STATS, PruneOptions

from ..output import out
from ..parameters import (
    Data,
    DryRun,
    Json,
    Output,
    Overwrite,
    Quiet,
    Resume,
    ShardSize,
    Validate,
    with_options,
)
from ._surgery import How, carry_out

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.surgery.plan import Plan
    from moe_compose.surgery.ranking import Ranking

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A mixture of experts: a folder, or org/name@revision."),
]
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


@with_options(PruneOptions)
def prune(
    source: Source,
    output: Output,
    options: PruneOptions,
    stats: Stats = None,
    explain: Explain = False,
    shard_size: ShardSize = SHARD_SIZE,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    validate: Validate = True,
    data: Data = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove the experts that matter least from a mixture of experts.

    The result is exactly the source with those experts masked, which is measured after writing;
    what is kept, and why not the rest, is in pruning.json beside it. Exit code 3: written, but not
    what was stated.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from ..prune_screen import explain_screen

    how = How(shard_size, dry_run, resume, overwrite, validate, data)

    def make(original: Checkpoint) -> Plan:
        return _plan(original, options, stats)

    carry_out(source, output, how, make, explain_screen if explain else None)


def _plan(original: Checkpoint, options: PruneOptions, stats: Path | None) -> Plan:
    from moe_compose.calibration.pruning import check_statistics, prune
    from moe_compose.errors import OptionError
    from moe_compose.surgery.prune import check_options

    check_options(original, options)
    if stats is not None and options.criterion in WITHOUT_STATS:
        raise OptionError(f"--stats has no meaning for criterion {options.criterion}: leave it out")
    evidence: ExpertStats | Ranking | None = None
    if options.criterion == "aimer":
        from moe_compose.calibration.aimer import rank_by_weights

        with out.counting("reading experts", "layers") as count:
            evidence = rank_by_weights(original, count)
    elif stats is not None:
        from moe_compose.calibration.stats import ExpertStats

        evidence = ExpertStats.load(stats)
        check_statistics(evidence, original)
    plan = prune(original, evidence, options)
    named = {"stats": stats.name} if stats is not None else {}
    return replace(plan, options={**plan.options, **named})
