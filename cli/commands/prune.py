"""`moe-compose prune`: a mixture of fewer experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.surgery.prune_options import WITHOUT_STATS, PruneOptions

from ..output import out
from ..parameters import Domains, Moe, Output, Texts, with_options
from ._refit import TOKENS, MaxKl, Recovery, Refit, RefitOn, RefitTokens, refitted
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.surgery.plan import Plan
    from moe_compose.surgery.ranking import Ranking

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
    recovery = Recovery(max_kl, refit, tuple(refit_on), refit_tokens, tuple(domains), tuple(data))
    recovery.check()
    compare_on = Path(data[0]) if data and not recovery.wanted else None
    how = replace(how, data=compare_on)

    def make(original: Checkpoint) -> Plan:
        if not recovery.wanted:
            return _plan(original, options, stats)
        return _recovered(original, options, stats, recovery, how.dry_run)

    def more(plan: Plan) -> RenderableType:
        from rich.console import Group

        from ..prune_screen import explain_screen
        from ..recovery_screen import recovery_screen

        return Group(*([explain_screen(plan)] if explain else []), recovery_screen(plan))

    carry_out(source, output, how, make, more if explain or recovery.wanted else None)


def _recovered(
    original: Checkpoint,
    options: PruneOptions,
    stats: Path | None,
    recovery: Recovery,
    dry_run: bool,
) -> Plan:
    """The count found, and the experts refitted."""
    from moe_compose.tradeoff.fewest import fewest

    held, fitted = recovery.texts()
    refitting = recovery.refit and not dry_run
    how = recovery.options if refitting else None
    if dry_run and recovery.refit:
        out.hint("Dry run: nothing is refitted; names and sizes are the same.")
    if recovery.max_kl is None:
        plan = _plan(original, options, stats)
        if how is None or fitted is None:
            return plan
        return refitted(plan, original, fitted, how)
    evidence = _evidence(original, options, stats)
    with out.counting(f"looking for KL {recovery.max_kl:g}", "candidates") as progress:
        found = fewest(
            original,
            evidence,
            held or (),
            recovery.max_kl,
            options,
            refit=how,
            refit_on=fitted if refitting else None,
            record={"stats": stats.name} if stats is not None else None,
            progress=progress,
        )
    return found.plan


def _plan(original: Checkpoint, options: PruneOptions, stats: Path | None) -> Plan:
    from moe_compose.calibration.pruning import prune
    from moe_compose.surgery.prune import check_options

    check_options(original, options)
    plan = prune(original, _evidence(original, options, stats), options)
    named = {"stats": stats.name} if stats is not None else {}
    return replace(plan, options={**plan.options, **named})


def _evidence(
    original: Checkpoint, options: PruneOptions, stats: Path | None
) -> ExpertStats | Ranking | None:
    """What the criterion goes by."""
    from moe_compose.errors import OptionError

    if stats is not None and options.criterion in WITHOUT_STATS:
        raise OptionError(f"--stats has no meaning for criterion {options.criterion}: leave it out")
    if options.criterion == "aimer":
        from moe_compose.calibration.aimer import rank_by_weights

        with out.counting("reading experts", "layers") as count:
            return rank_by_weights(original, count)
    if stats is None:
        return None
    from moe_compose.calibration.pruning import check_statistics
    from moe_compose.calibration.stats import ExpertStats

    found = ExpertStats.load(stats)
    check_statistics(found, original)
    return found
