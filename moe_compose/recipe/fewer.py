"""Steps that leave fewer experts: prune and merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import parse_domains, read_domains
from moe_compose.errors import OptionError
from moe_compose.recipe.recovery import Recovery
from moe_compose.recipe.state import State

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain
    from moe_compose.calibration.options import CalibrateOptions
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.surgery.merge_options import MergeOptions
    from moe_compose.surgery.plan import Plan
    from moe_compose.surgery.prune_options import PruneOptions
    from moe_compose.surgery.ranking import Ranking

_DRY = "Dry run: nothing is refitted; names and sizes are the same."
_SIMILAR = "with similarities (similarity: true, --similarity)"


def prune_experts(state: State, options: PruneOptions, given: Mapping[str, Any]) -> Plan:
    """Fewer experts."""
    from moe_compose.calibration.pruning import prune
    from moe_compose.surgery.prune import check_options
    from moe_compose.tradeoff.fewest import check_limit, fewest

    source, recovery = state.source(given), Recovery.of(given, by_data=True)
    if "max_kl" in given:
        check_limit(source, given["max_kl"], options)
    else:
        check_options(source, options)
    evidence = _evidence(state, source, options, given)
    record = {"stats": given["stats"].name} if "stats" in given else {}
    if state.dry:
        if recovery.fitted is not None:
            state.watch.remark(_DRY)
        plan = _unmeasured(state, source, options, given, evidence)
        return replace(plan, options={**plan.options, **record})
    if recovery.held is None:
        plan = prune(source, evidence, options)
        plan = replace(plan, options={**plan.options, **record})
        return recovery.refitted(state, plan, source)
    with state.watch.counting(f"looking for KL {given['max_kl']:g}", "candidates") as progress:
        return fewest(
            source,
            evidence,
            recovery.held,
            given["max_kl"],
            options,
            refit=None if recovery.fitted is None else recovery.options,
            refit_on=recovery.fitted,
            record=record,
            progress=progress,
        ).plan


def _unmeasured(
    state: State,
    source: TensorSource,
    options: PruneOptions,
    given: Mapping[str, Any],
    evidence: ExpertStats | Ranking | None,
) -> Plan:
    """As many experts as will stay, or at most will; where only text can tell which, any."""
    from moe_compose.calibration.pruning import prune
    from moe_compose.surgery.prune import prune_ranked
    from moe_compose.surgery.prune_options import allowed_counts
    from moe_compose.surgery.ranking import Ranking
    from moe_compose.surgery.selection import moe_form

    _, moe = moe_form(source)
    if "max_kl" not in given:
        if evidence is not None or options.criterion in ("random", "given"):
            return prune(source, evidence, options)
    else:
        counts = [c for c in allowed_counts(options, moe) if c < moe.num_experts]
        options = replace(options, keep=max(counts, default=moe.num_experts))
        state.watch.remark("Dry run: no count is searched; these are the largest sizes there are.")
    ranking = Ranking.random(moe.num_experts, moe.sparse_layers, options.seed)
    return prune_ranked(source, ranking, options)


def _evidence(
    state: State, source: TensorSource, options: PruneOptions, given: Mapping[str, Any]
) -> ExpertStats | Ranking | None:
    """What the criterion goes by; None where it needs nothing, or in a dry run does not have it.

    Raises:
        OptionError: it will not have it, or what it has is of no use.
    """
    from moe_compose.surgery.prune_options import OF_MASKED, WITHOUT_STATS

    criterion = options.criterion
    if "stats" in given and criterion in WITHOUT_STATS:
        raise OptionError(f"--stats has no meaning for criterion {criterion}: leave it out")
    if criterion == "aimer" and (state.alone or not state.dry):
        from moe_compose.calibration.aimer import rank_by_weights

        with state.layers("reading experts") as count:
            return rank_by_weights(source, count)
    if criterion in WITHOUT_STATS:
        return None
    found = state.statistics(given, source)
    if found is not None or "stats" in given:
        return found
    if state.measuring is None:
        raise OptionError(
            f"criterion {criterion} needs statistics: moe-compose calibrate makes them (--stats)",
            hint="In a recipe, a calibrate step before it does as well.",
        )
    if criterion in OF_MASKED and not state.measuring.loo_tokens:
        raise OptionError(f"criterion {criterion} needs loo_tokens of the calibrate step before it")
    return None


def merge_experts(state: State, options: MergeOptions, given: Mapping[str, Any]) -> Plan:
    """Alike experts become one."""
    from moe_compose.surgery.merge import check_merge_options, merge_unmeasured

    source, recovery = state.source(given), Recovery.of(given, by_data=False)
    measure = _measure(state, given)
    check_merge_options(source, options)
    if state.dry and recovery.fitted is not None:
        state.watch.remark(_DRY)
    if "domain" in given:
        texts = read_domains(parse_domains(given["domain"]))
        if state.dry:
            state.watch.remark("Dry run: nothing is measured; what is merged with what is open.")
            return merge_unmeasured(source, options)
        plan = _in_sequence(state, source, texts, options, measure, given)
    else:
        stats = state.statistics(given, source)
        if stats is None or (state.dry and not state.alone):
            return merge_unmeasured(source, options)
        plan = _by_statistics(state, source, stats, options, given)
    return plan if state.dry else recovery.refitted(state, plan, source)


def _measure(state: State, given: Mapping[str, Any]) -> CalibrateOptions:
    """How text is measured; all that is wrong about what experts are grouped by.

    Raises:
        OptionError: so it is.
    """
    from moe_compose.calibration.options import CalibrateOptions

    asked = {n: given[n] for n in ("tokens", "seq_len", "sample") if n in given}
    if "stats" in given and "domain" in given:
        raise OptionError(
            "one of --stats and --domain says what to group experts by (both given)",
            hint="moe-compose calibrate --similarity makes statistics; --domain NAME=FILE is text.",
        )
    if "domain" not in given:
        if not state.measures(given):
            raise OptionError(
                "one of --stats and --domain says what to group experts by (neither given)",
                hint=f"In a recipe, a calibrate step {_SIMILAR} before it does as well.",
            )
        if "stats" not in given and state.measuring and not state.measuring.similarity:
            raise OptionError(f"merge needs a calibrate step {_SIMILAR} before it")
        if asked:
            raise OptionError(
                "--tokens, --seq-len and --sample are of the text of --domain; --stats was measured"
            )
    return CalibrateOptions(similarity=True, **asked).check()


def _in_sequence(
    state: State,
    source: TensorSource,
    texts: tuple[Domain, ...],
    options: MergeOptions,
    measure: CalibrateOptions,
    given: Mapping[str, Any],
) -> Plan:
    from moe_compose.calibration.sequence import merge_in_sequence

    with state.layers("merging in sequence") as count:
        plan = merge_in_sequence(source, texts, options, measure, progress=count)
    told = {"tokens": measure.tokens, "seq_len": measure.seq_len, "sample": measure.sample}
    named = [
        f"{name}={Path(file).name}" for name, _, file in (d.partition("=") for d in given["domain"])
    ]
    return replace(plan, options={**plan.options, "domain": named, **told})


def _by_statistics(
    state: State,
    source: TensorSource,
    stats: ExpertStats,
    options: MergeOptions,
    given: Mapping[str, Any],
) -> Plan:
    from moe_compose.calibration.merging import merge

    if not source.weight_files and options.align != "none":
        state.watch.remark(
            f"Only headers of {source.label} are here: neurons are not aligned in this run."
        )
        options = replace(options, align="none")
    with state.layers("aligning neurons") as count:
        plan = merge(source, stats, options, progress=count)
    record = {"stats": given["stats"].name} if "stats" in given else {}
    return replace(plan, options={**plan.options, **record})
