"""What steps do about what they lose, and the text that it takes: `max_kl`, `refit`, and the step
that only refits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import read_texts
from moe_compose.errors import OptionError
from moe_compose.recipe.acts import texts_of
from moe_compose.recipe.state import State
from moe_compose.surgery.unchanged import LATER, unchanged

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.recovery.options import RefitOptions
    from moe_compose.surgery.plan import Plan


def recovers(given: Mapping[str, Any]) -> bool:
    """Whether a count is searched, or anything refitted."""
    return "max_kl" in given or bool(given.get("refit"))


def _words(given: Mapping[str, Any]) -> tuple[str, ...]:
    return (*given.get("domain", ()), *given.get("data", ()))


def compared_on(given: Mapping[str, Any]) -> Path | None:
    """Text of a pruning that is neither to search nor to refit by: its result is compared on it."""
    words = given.get("data", ())
    if recovers(given) or "domain" in given or len(words) != 1 or words[0].startswith("hf:"):
        return None
    path = Path(words[0])
    return path if path.exists() or "=" not in words[0] else None


def refit_text(given: Mapping[str, Any]) -> tuple[Domain, ...] | None:
    """Text that is only to refit to, read; None where there is none.

    Raises:
        OptionError: it has no use, or cannot be read.
    """
    if "refit_on" not in given:
        return None
    if not given.get("refit"):
        raise OptionError("--refit-on has no meaning without --refit")
    return read_texts(*given["refit_on"])


def refit_options(given: Mapping[str, Any]) -> RefitOptions:
    """How `refit` is done."""
    from moe_compose.recovery.options import RefitOptions

    return RefitOptions(tokens=given.get("refit_tokens", RefitOptions().tokens))


@dataclass(frozen=True, slots=True)
class Recovery:
    """What pruning and merging do about what they lose, and the text that it takes.

    Attributes:
        held: held-out text, by which the count for a KL is found; None: it is given.
        fitted: text that down-projections are refitted to; None: they are not.
        options: how.
    """

    held: tuple[Domain, ...] | None
    fitted: tuple[Domain, ...] | None
    options: RefitOptions

    @classmethod
    def of(cls, given: Mapping[str, Any], *, by_data: bool) -> Recovery:
        """What is asked for, the text read.

        Args:
            given: of the step.
            by_data: its `data` and `domain` are text to search or to refit by.

        Raises:
            OptionError: text that is missing, or has no use; or unreadable text.
        """
        if problems := list(_text_problems(given, by_data)):
            raise OptionError("these texts cannot be meant", problems=problems)
        held = fitted = None
        if given.get("refit"):
            fitted = refit_text(given) or texts_of(given)
        if "max_kl" in given:
            held = texts_of(given)
        return cls(held, fitted, refit_options(given))

    def refitted(self, state: State, plan: Plan, source: TensorSource) -> Plan:
        """The plan with down-projections refitted, if that is asked for."""
        if self.fitted is None:
            return plan
        return _refitted(state, plan, source, self.fitted, self.options)


def _refitted(
    state: State,
    plan: Plan,
    source: TensorSource,
    texts: tuple[Domain, ...],
    options: RefitOptions,
) -> Plan:
    from moe_compose.recovery.refit import refit

    with state.layers("refitting") as count:
        found = refit(plan, source, texts, options, progress=count)
    if found is plan:
        state.watch.remark("Nothing is refitted: no layer's error fell on held-out text.")
    return found


def _text_problems(given: Mapping[str, Any], by_data: bool) -> Iterator[str]:
    limit, refit = "max_kl" in given, bool(given.get("refit"))
    words = _words(given) if by_data else ()
    for name in ("refit_on", "refit_tokens"):
        if name in given and not refit:
            yield f"--{name.replace('_', '-')} has no meaning without --refit"
    if limit and not words:
        yield "--max-kl needs held-out text: --data FILE, or --domain NAME=FILE"
    if limit and refit and "refit_on" not in given:
        yield "--refit with --max-kl needs text of its own: --refit-on FILE"
    if not limit and refit and bool(words) == ("refit_on" in given):
        others = ", or --data, or --domain; one" if by_data else ""
        yield f"--refit needs text: --refit-on FILE{others}"
    if not recovers(given) and words and compared_on(given) is None:
        yield "without --refit and --max-kl one --data FILE is compared on"


def refit_plan(state: State, options: RefitOptions, given: Mapping[str, Any]) -> Plan:
    """Down-projections refitted to what was before."""
    from moe_compose.surgery.plan import Plan

    model, after = state.model, ("prune", "merge", "refit")
    if not isinstance(model, Plan) or model.operation not in after or state.saved:
        raise OptionError("refit follows a step that prunes or merges, with nothing saved between")
    assert state.before is not None
    texts = texts_of(given)
    if state.dry:
        return unchanged(model, "refit", LATER)
    return _refitted(state, model, state.before, texts, options)
