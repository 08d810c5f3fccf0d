"""A command as a step of a recipe: both are carried out by the same functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_compose.recipe.state import Count, State, Watch

from ..output import out

if TYPE_CHECKING:
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.surgery.plan import Plan

    from ._surgery import How


class Shown(Watch):
    """Progress and remarks on the screen."""

    def remark(self, text: str) -> None:
        """A hint."""
        out.hint(text)

    @contextmanager
    def counting(self, what: str, unit: str = "bytes") -> Iterator[Count | None]:
        """A bar, or lines."""
        with out.counting(what, unit) as count:
            yield count

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner, or a line."""
        with out.waiting(what):
            yield


def given_of(name: str, /, **values: Any) -> dict[str, Any]:
    """What a step reads beside its options, from flags: those that say nothing are left out."""
    from moe_compose.recipe.inputs import read_given
    from moe_compose.recipe.steps import STEPS

    return read_given(STEPS[name].inputs, {k.removesuffix("_"): v for k, v in values.items()})


def step(
    name: str, options: Any, given: Mapping[str, Any], how: How
) -> Callable[[Checkpoint], Plan]:
    """What makes the plan of a command.

    Args:
        name: of the step.
        options: its options.
        given: what it reads beside them.
        how: the shared flags.
    """

    def make(original: Checkpoint) -> Plan:
        from moe_compose.recipe.steps import STEPS

        state = State(dry=how.dry_run, alone=True, resume=how.resume, watch=Shown(), model=original)
        if "base" in given:
            state.opened[given["base"]] = original
        plan: Plan = STEPS[name].act(state, options, given)
        return plan

    return make


def find(name: str, source: str, options: Any, given: Mapping[str, Any], **how: Any) -> Any:
    """What a command finds that makes no model.

    Args:
        name: of the step.
        source: the model, as it was typed.
        options: its options.
        given: what it reads and writes beside them.
        how: `resume`, `overwrite`, `headers_only`.
    """
    from moe_compose.recipe.steps import STEPS

    state = State(alone=True, watch=Shown(), **how)
    return STEPS[name].act(state, options, {"source": source, **given})
