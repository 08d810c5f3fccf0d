"""Conditions on the result of a step: measured on held-out text, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import read_texts
from moe_compose.errors import MoeComposeError, OptionError

if TYPE_CHECKING:
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.recipe.state import State
    from moe_compose.surgery.plan import Plan

#: Tokens that a condition is measured on unless it says otherwise.
TOKENS = 16_384

#: What is compared with a reference.
_COMPARED = ("max_kl", "min_top1")


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
        MoeComposeError: it does not hold.
    """
    from moe_compose.evaluation.measure import evaluate
    from moe_compose.evaluation.options import EvaluateOptions

    if not any(name.startswith(("max_", "min_")) for name in wanted):
        raise OptionError("assert demands nothing: max_kl, min_top1 or max_loss")
    texts = read_texts(*wanted["data"])
    reference = state.open(wanted["against"]) if "against" in wanted else before
    compared = any(name in wanted for name in _COMPARED)
    options = EvaluateOptions(tokens=wanted.get("tokens", TOKENS), greedy=0)
    if state.dry:
        return ""
    with state.watch.counting("measuring the condition", "tokens") as count:
        found = evaluate(
            plan, texts, against=reference if compared else None, options=options, progress=count
        ).overall
    return _held(wanted, {"max_kl": found.kl, "min_top1": found.top1, "max_loss": found.loss})


def _held(wanted: Mapping[str, Any], figures: Mapping[str, float | None]) -> str:
    """What was measured beside what is demanded, if it holds."""
    said, broken = [], []
    for name, figure in figures.items():
        if name not in wanted or figure is None:
            continue
        kind, _, what = name.partition("_")
        most = kind == "max"
        limit = f"at {'most' if most else 'least'} {wanted[name]:g}"
        said.append(f"{what} {figure:.4f} ({limit})")
        if not (figure <= wanted[name] if most else figure >= wanted[name]):
            broken.append(said[-1])
    if broken:
        raise MoeComposeError(
            "a condition does not hold",
            problems=broken,
            hint="Loosen it, or the step; with --resume, what was measured and trained is kept.",
        )
    return ", ".join(said)
