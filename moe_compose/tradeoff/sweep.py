"""`sweep`: quality against size of prune plans, none of which is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.texts import Texts
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.recovery.options import RefitOptions
from moe_compose.surgery.prune_options import (
    WITHOUT_STATS,
    PruneOptions,
    allowed_counts,
    kept_count,
    option_problems,
)
from moe_compose.surgery.selection import moe_form
from moe_compose.surgery.unchanged import unchanged
from moe_compose.tradeoff.measure import Bench, bench
from moe_compose.tradeoff.options import BASELINE, SweepOptions
from moe_compose.tradeoff.result import Candidate, Sweep, knee, smallest_within

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.tradeoff.measure import Evidence

#: Tells how far it is: candidates evaluated, candidates in all.
Progress = Callable[[int, int], None]


def sweep(
    source: TensorSource,
    stats: ExpertStats | None,
    texts: Texts,
    options: SweepOptions | None = None,
    *,
    evaluation: EvaluateOptions | None = None,
    refit: RefitOptions | None = None,
    refit_on: Any = None,
    progress: Progress | None = None,
) -> Sweep:
    """Evaluate prune plans of several criteria and sizes beside the original.

    Args:
        source: an MoE.
        stats: what calibration measured on it; None where no criterion needs it.
        texts: held-out text, of none of which the statistics are.
        options: ratios and criteria; `random` is always among them.
        evaluation: how much text, and how it is run.
        refit: how candidates are refitted; None, and no `refit_on`: they are not.
        refit_on: the text that they are refitted to; nothing of it may be in `texts`.
        progress: told after every candidate.

    Returns:
        The candidates, the knee, and the smallest one within `options.max_kl`.

    Raises:
        OptionError: options or texts that cannot be meant; ratios that leave fewer experts than the
            router picks are left out, which is said, unless all do.
        CheckpointError: the statistics are of another checkpoint.

    Example:
        >>> found = sweep(moe, stats, held_out, SweepOptions(max_kl=0.1))   # doctest: +SKIP
        >>> found.chosen.name                                               # doctest: +SKIP
        'reap, 12 experts'
    """
    options = options or SweepOptions()
    table = bench(source, texts, evaluation, refit_on, refit)
    asked, notes = _asked(table, options)
    evidence = _evidence(source, stats, options)
    _check(source, asked, evidence)
    candidates: list[Candidate] = []
    loss = 0.0
    for number, how in enumerate(asked, 1):
        plan = table.plan(evidence[how.criterion], how)
        candidate, found = table.measured(plan, how)
        candidates.append(candidate)
        loss = found.overall.reference_loss or 0.0
        if progress is not None:
            progress(number, len(asked))
    candidates.sort(key=lambda c: (-c.keep, c.kl))
    whole = unchanged(source).summary()
    return Sweep(
        source=source.label,
        experts=table.moe.num_experts,
        parameters=whole.parameters.total,
        bytes=whole.bytes,
        loss=loss,
        candidates=tuple(candidates),
        knee=knee(candidates),
        max_kl=options.max_kl,
        chosen=None if options.max_kl is None else smallest_within(candidates, options.max_kl),
        notes=tuple(notes),
        options={
            **asdict(options),
            "evaluation": asdict(table.options),
            "refit": asdict(table.refit) if table.fitted is not None else None,
        },
        data={
            n: [asdict(f) for f in fs]
            for n, fs in zip(table.held.domains, table.held.files, strict=True)
        },
    )


def _asked(table: Bench, options: SweepOptions) -> tuple[list[PruneOptions], list[str]]:
    """Every criterion at every count, each once; and what was left out."""
    counts, notes = [], []
    allowed = set(allowed_counts(PruneOptions(criterion=BASELINE), table.moe))
    for ratio in options.ratios:
        count = kept_count(PruneOptions(ratio=ratio), table.moe)
        if count == table.moe.num_experts:
            notes.append(f"ratio {ratio:g} removes no expert")
        elif count in allowed:
            counts.append(count)
        else:
            notes.append(
                f"ratio {ratio:g} would leave {count} experts, which the router cannot do with "
                f"(top_k = {table.moe.top_k})"
            )
    if not counts:
        raise OptionError("none of the ratios gives a model", problems=notes)
    found = [
        PruneOptions(keep=count, criterion=criterion, seed=options.seed)
        for count in dict.fromkeys(counts)
        for criterion in options.all_criteria
    ]
    return found, notes


def _evidence(
    source: TensorSource, stats: ExpertStats | None, options: SweepOptions
) -> dict[str, Evidence]:
    """What each criterion is told.

    Raises:
        OptionError: statistics are missing.
    """
    missing = [c for c in options.criteria if c not in WITHOUT_STATS]
    if stats is None and missing:
        raise OptionError(
            f"criteria {', '.join(missing)} need statistics: moe-compose calibrate makes them",
            hint="Give them (--stats FOLDER).",
        )
    found: dict[str, Evidence] = {}
    for criterion in options.all_criteria:
        if criterion == "aimer":
            from moe_compose.calibration.aimer import rank_by_weights

            found[criterion] = rank_by_weights(source)
        else:
            found[criterion] = None if criterion in WITHOUT_STATS else stats
    return found


def _check(
    source: TensorSource, asked: Sequence[PruneOptions], evidence: Mapping[str, Evidence]
) -> None:
    """What a later candidate lacks shall not come out after hours of evaluating others.

    Raises:
        OptionError: a criterion cannot be meant for this model, or for these statistics.
    """
    from moe_compose.calibration.pruning import evidence_problems

    _, moe = moe_form(source)
    problems = [
        problem
        for how in asked
        for problem in (
            *option_problems(how, moe),
            *evidence_problems(evidence[how.criterion], how),
        )
    ]
    if problems:
        raise OptionError("this sweep cannot be meant", problems=list(dict.fromkeys(problems)))
