"""`fewest`: how few experts a KL allows, by bisection.

It is taken for granted that KL does not fall when an expert more goes. Where that is not so, the
count found still keeps to the limit, but a smaller one might have too; `sweep` looks at them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.texts import Texts
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import ConditionError, OptionError
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.recovery.options import RefitOptions
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.prune import check_options
from moe_compose.surgery.prune_options import PruneOptions, allowed_counts
from moe_compose.surgery.selection import moe_form
from moe_compose.tradeoff.measure import bench
from moe_compose.tradeoff.result import Candidate

if TYPE_CHECKING:
    from moe_compose.tradeoff.measure import Evidence

#: Beside the result: what was tried.
REPORT_NAME = "max_kl.json"


@dataclass(frozen=True, eq=False)
class Fewest:
    """The smallest plan within a limit.

    Attributes:
        plan: refitted, if that was asked; with all that was tried among its reports.
        options: of the pruning, `keep` filled in.
        candidate: its figures.
        tried: in order.
    """

    plan: Plan
    options: PruneOptions
    candidate: Candidate
    tried: tuple[Candidate, ...]


def fewest(
    source: TensorSource,
    evidence: Evidence,
    texts: Texts,
    max_kl: float,
    options: PruneOptions | None = None,
    *,
    evaluation: EvaluateOptions | None = None,
    refit: RefitOptions | None = None,
    refit_on: Any = None,
    record: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fewest:
    """The smallest count of experts whose mean KL to the original is at most `max_kl`.

    Args:
        source: an MoE.
        evidence: as for `prune`.
        texts: held-out text.
        max_kl: nats per token.
        options: of the pruning, without `keep`, `ratio` and `size`.
        evaluation: how much text, and how it is run.
        refit: how candidates are refitted; None, and no `refit_on`: they are not.
        refit_on: the text that they are refitted to.
        record: entries for the options of the pruning, as its record holds them.
        progress: told after every candidate: tried, at most.

    Raises:
        OptionError: `keep`, `ratio` or `size` is given, or options that cannot be meant.
        ConditionError: not even one expert fewer is within the limit.
    """
    options = options or PruneOptions()
    check_limit(source, max_kl, options)
    table = replace(bench(source, texts, evaluation, refit_on, refit), record=dict(record or {}))
    counts = [c for c in allowed_counts(options, table.moe) if c < table.moe.num_experts]
    tried: list[Candidate] = []
    best: tuple[Plan, PruneOptions, Candidate] | None = None
    low, high = 0, len(counts)
    most = len(counts).bit_length()
    while low < high:  # counts[high:] are within the limit
        middle = (low + high) // 2
        how = replace(options, keep=counts[middle])
        plan = table.plan(evidence, how)
        candidate, _ = table.measured(plan, how)
        tried.append(candidate)
        if candidate.kl <= max_kl:
            high, best = middle, (plan, how, candidate)
        else:
            low = middle + 1
        if progress is not None:
            progress(len(tried), most)
    if best is None:
        least = f" ({tried[-1].keep} experts: {tried[-1].kl:.4g})" if tried else ""
        raise ConditionError(f"no pruning by {options.criterion} stays within KL {max_kl:g}{least}")
    plan, how, candidate = best
    report = {
        "max_kl": max_kl,
        "rule": "bisection: KL is taken not to fall when experts go",
        "chosen": asdict(candidate),
        "tried": [asdict(c) for c in tried],
    }
    plan = replace(plan, reports={**plan.reports, REPORT_NAME: report})
    return Fewest(plan, how, candidate, tuple(tried))


def check_limit(source: TensorSource, max_kl: float, options: PruneOptions) -> None:
    """Refuse what cannot be meant, before anything is read.

    Raises:
        OptionError: `keep`, `ratio` or `size` is given beside `max_kl`, or other options are wrong.
        UnsupportedError: no MoE, or one whose experts cannot be selected.
    """
    if any(x is not None for x in (options.keep, options.ratio, options.size)):
        raise OptionError("max_kl decides how many experts stay: leave keep, ratio and size out")
    if not max_kl > 0:
        raise OptionError(f"max_kl ({max_kl}) must be above 0")
    check_options(source, replace(options, keep=moe_form(source)[1].num_experts))
