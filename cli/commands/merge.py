"""`moe-compose merge`: a mixture of fewer experts, means of those that are alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.calibration.options import CalibrateOptions
from moe_compose.recovery.options import RefitOptions
from moe_compose.surgery.merge_options import MergeOptions

from ..output import out
from ..parameters import Moe, Output, with_options
from ._refit import TOKENS, Refit, RefitOn, RefitTokens, read_words, refitted
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_compose.checkpoint.reader import Checkpoint
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
    measure = replace(MEASURE, tokens=tokens, seq_len=seq_len, sample=sample)
    _check(stats, domains, measure)
    _check_refit(refit, refit_on)

    def make(original: Checkpoint) -> Plan:
        if stats is not None:
            plan = _by_statistics(original, options, stats)
        else:
            plan = _in_sequence(original, options, domains, measure)
        if not refit or how.dry_run:
            return plan
        texts = read_words(refit_on) or ()
        return refitted(plan, original, texts, RefitOptions(tokens=refit_tokens))

    def more(plan: Plan) -> RenderableType:
        from rich.console import Group

        from ..merge_screen import groups_screen
        from ..recovery_screen import recovery_screen

        shown = [groups_screen(plan)] if explain else []
        return Group(*shown, *([recovery_screen(plan)] if refit else []))

    carry_out(source, output, how, make, more if explain or refit else None)


def _check_refit(refit: bool, refit_on: list[str]) -> None:
    from moe_compose.errors import OptionError

    if refit and not refit_on:
        raise OptionError("--refit needs text: --refit-on FILE")
    if refit_on and not refit:
        raise OptionError("--refit-on has no meaning without --refit")


def _check(stats: Path | None, domains: list[str], measure: CalibrateOptions) -> None:
    from moe_compose.errors import OptionError

    if (stats is None) == (not domains):
        given = "both" if domains else "neither"
        raise OptionError(
            f"one of --stats and --domain says what to group experts by ({given} given)",
            hint="moe-compose calibrate --similarity makes statistics; --domain NAME=FILE is text.",
        )
    if stats is not None and measure != MEASURE:
        raise OptionError(
            "--tokens, --seq-len and --sample are of the text of --domain; --stats was measured"
        )
    measure.check()


def _in_sequence(
    original: Checkpoint, options: MergeOptions, domains: list[str], measure: CalibrateOptions
) -> Plan:
    from moe_compose.calibration.data import parse_domains, read_domains
    from moe_compose.calibration.sequence import merge_in_sequence
    from moe_compose.errors import OptionError
    from moe_compose.surgery.merge import check_merge_options

    check_merge_options(original, options)
    if not original.weight_files:
        raise OptionError(
            f"{original.label} is not on this disk, and merging in sequence runs it",
            hint="Leave --dry-run out to download it, or give --stats.",
        )
    texts = read_domains(parse_domains(domains, []))
    with out.counting("merging in sequence", "layers") as count:
        plan = merge_in_sequence(original, texts, options, measure, progress=count)
    told = {"tokens": measure.tokens, "seq_len": measure.seq_len, "sample": measure.sample}
    named = [f"{name}={Path(file).name}" for name, _, file in (d.partition("=") for d in domains)]
    return replace(plan, options={**plan.options, "domain": named, **told})


def _by_statistics(original: Checkpoint, options: MergeOptions, folder: Path) -> Plan:
    from moe_compose.calibration.merging import merge
    from moe_compose.calibration.pruning import check_statistics
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.surgery.merge import check_merge_options

    check_merge_options(original, options)
    stats = ExpertStats.load(folder)
    check_statistics(stats, original)
    if not original.weight_files and options.align != "none":
        out.hint(f"Only headers of {original.label} are here: neurons are not aligned in this run.")
        options = replace(options, align="none")
    with out.counting("aligning neurons", "layers") as count:
        plan = merge(original, stats, options, progress=count)
    return replace(plan, options={**plan.options, "stats": folder.name})
