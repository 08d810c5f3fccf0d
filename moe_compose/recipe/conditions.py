"""Conditions on the result of a step: measured on held-out text, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import read_texts
from moe_compose.errors import ConditionError, OptionError

if TYPE_CHECKING:
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.evaluation.result import DomainScore, Evaluation
    from moe_compose.recipe.state import State
    from moe_compose.surgery.plan import Plan

#: Tokens that a condition is measured on unless it says otherwise.
TOKENS = 16_384

#: Ends the name of a limit that every domain is held to; without it, the mean over all text is.
_WORST = "_worst"


def compared(wanted: Collection[str]) -> bool:
    """Whether limits are about the distance to a reference."""
    return any(name.removesuffix(_WORST) in ("max_kl", "min_top1") for name in wanted)


def check_conditions(
    state: State, plan: Plan, before: TensorSource | None, wanted: Mapping[str, Any]
) -> str:
    """Measure what a condition demands; returns it in words, nothing in a dry run.

    Args:
        state: where the recipe stands.
        plan: the result.
        before: what it is compared with, unless the condition says what.
        wanted: the condition.

    Raises:
        OptionError: text that cannot be read, or nothing is demanded.
        ConditionError: it does not hold.
    """
    from moe_compose.evaluation.measure import evaluate
    from moe_compose.evaluation.options import EvaluateOptions

    if not any(name.startswith(("max_", "min_")) for name in wanted):
        raise OptionError("assert demands nothing: max_kl, max_kl_worst, min_top1 or max_loss")
    texts = read_texts(*wanted["data"])
    reference = state.open(wanted["against"]) if "against" in wanted else before
    options = EvaluateOptions(tokens=wanted.get("tokens", TOKENS), greedy=0)
    if state.dry:
        return ""
    against = reference if compared(wanted) else None
    with state.watch.counting("measuring the condition", "tokens") as count:
        found = evaluate(plan, texts, against=against, options=options, progress=count)
    return held(wanted, found)


def held(wanted: Mapping[str, Any], found: Evaluation) -> str:
    """What was measured beside what is demanded, if it holds.

    Args:
        wanted: `max_kl`, `min_top1`, `max_loss` of all text, and the same with `_worst` of every
            domain; other entries are no limits.
        found: the result on held-out text.

    Raises:
        ConditionError: it does not.
    """
    said, broken = [], []
    for name, limit in wanted.items():
        kind, _, rest = name.partition("_")
        measure = rest.removesuffix(_WORST)
        if kind not in ("max", "min") or measure not in ("kl", "top1", "loss"):
            continue
        most = kind == "max"
        figures = _figures(found, measure, by_domain=rest.endswith(_WORST))
        where, figure = (max if most else min)(figures.items(), key=lambda x: x[1])
        of = f" of {where}" if where else ""
        said.append(f"{measure}{of} {figure:.4f} (at {'most' if most else 'least'} {limit:g})")
        if not (figure <= limit if most else figure >= limit):
            broken.append(said[-1])
    if broken:
        raise ConditionError(
            "a condition does not hold",
            problems=broken,
            hint="Change the condition, or the step; with --resume, what was measured and trained "
            "is kept.",
        )
    return ", ".join(said)


def _figures(found: Evaluation, measure: str, *, by_domain: bool) -> dict[str, float]:
    """Domain → its figure; of all text together under no name. What is no number is the worst."""
    scores: Mapping[str, DomainScore] = found.domains if by_domain else {"": found.overall}
    worst = -math.inf if measure == "top1" else math.inf
    figures = {name: getattr(score, measure) for name, score in scores.items()}
    return {name: worst if math.isnan(x) else x for name, x in figures.items()}
