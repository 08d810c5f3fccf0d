"""A recipe carried out.

Plans stay plans: a step starts from the plan of the one before, so nothing is written between them
unless `save` says so; calibrations, conditions and training run a plan as they run a checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import read_texts
from moe_compose.errors import MoeComposeError
from moe_compose.recipe.acts import State
from moe_compose.recipe.reading import Recipe, RecipeStep

if TYPE_CHECKING:
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.surgery.plan import Plan
    from moe_compose.validation.report import ValidationReport

#: Tokens that a condition is measured on unless it says otherwise.
TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Written:
    """A result on disk.

    Attributes:
        step: its index.
        folder: where it is.
        checkpoint: what was written.
        report: of its validation; None: it was not validated.
    """

    step: int
    folder: Path
    checkpoint: Checkpoint
    report: ValidationReport | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a run tells: a step begins, its plan is there, a condition holds, a result is
    written.
    """

    step: int
    operation: str
    plan: Plan | None = None
    measured: str = ""
    written: Written | None = None


Tell = Callable[[Event], None]


def run_recipe(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, tell: Tell | None = None
) -> list[Written]:
    """Carry a recipe out.

    Args:
        recipe: what `read_recipe` gave.
        resume: go on with what an interrupted run has written.
        overwrite: replace results that are there.
        tell: told of every step.

    Returns:
        What was written, the last result last.

    Raises:
        MoeComposeError: a step that cannot be carried out, or a condition that does not hold; the
            message names the step. What was saved before stays.
    """
    with tempfile.TemporaryDirectory(prefix="moe-compose-") as folder:
        run = _Run(recipe, State(Path(folder), resume), resume, overwrite, tell or (lambda _: None))
        for i, step in enumerate(recipe.steps):
            try:
                run.step(i, step)
            except MoeComposeError as error:
                where = f"{step.place} ({step.operation}): {error.message}"
                said = MoeComposeError(where, problems=error.problems, hint=error.hint)
                said.exit_code = error.exit_code
                raise said from error
        return run.written


@dataclass
class _Run:
    """One run under way."""

    recipe: Recipe
    state: State
    resume: bool
    overwrite: bool
    tell: Tell

    def __post_init__(self) -> None:
        self.written: list[Written] = []

    def step(self, index: int, step: RecipeStep) -> None:
        """Carry one step out, hold its result to the conditions, and write it where it is asked."""
        self.tell(Event(step=index, operation=step.operation))
        last = index == len(self.recipe.steps) - 1
        if step.step.makes == "statistics":
            step.step.act(self.state, step.options, step.given)
            return
        before = None if "base" in step.given else self.state.source(step.given)
        plan = step.step.act(self.state, step.options, step.given)
        assert plan is not None
        self.tell(Event(step=index, operation=step.operation, plan=plan))
        if step.conditions:
            said = check_conditions(plan, before, step.conditions)
            self.tell(Event(step=index, operation=step.operation, measured=said))
        self.state.model, self.state.before = plan, before or self.state.before
        if "save" in step.given:
            self._write(index, step, plan, Path(step.given["save"]), before)
        if last:
            self._write(index, step, plan, self.recipe.output, before)

    def _write(
        self, index: int, step: RecipeStep, plan: Plan, folder: Path, before: TensorSource | None
    ) -> None:
        from moe_compose.checkpoint.writer import SHARD_SIZE
        from moe_compose.reporting.publish import record_validation, write
        from moe_compose.validation import preflight, validate

        if self.recipe.validate:
            preflight(plan)
        checkpoint = write(
            plan,
            folder,
            shard_size=self.recipe.shard_size or SHARD_SIZE,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        report = None
        if self.recipe.validate:
            report = validate(checkpoint, against=before, preservation=plan.preservation)
            record_validation(checkpoint, plan, report)
        done = Written(step=index, folder=folder, checkpoint=checkpoint, report=report)
        self.written.append(done)
        self.state.model = checkpoint
        self.tell(Event(step=index, operation=step.operation, written=done))


def check_conditions(plan: Plan, before: TensorSource | None, wanted: Mapping[str, Any]) -> str:
    """Measure what a condition demands; returns it in words.

    Raises:
        MoeComposeError: it does not hold.
    """
    from moe_compose.evaluation.measure import evaluate
    from moe_compose.evaluation.options import EvaluateOptions

    against = before if "max_kl" in wanted else None
    options = EvaluateOptions(tokens=wanted.get("tokens", TOKENS), greedy=0)
    found = evaluate(plan, read_texts(*wanted["data"]), against=against, options=options).overall
    figures = {"max_loss": found.loss, "max_kl": found.kl}
    said, broken = [], []
    for name, figure in figures.items():
        if name in wanted and figure is not None:
            said.append(f"{name.removeprefix('max_')} {figure:.4f} (at most {wanted[name]:g})")
            if not figure <= wanted[name]:
                broken.append(said[-1])
    if broken:
        raise MoeComposeError(
            "a condition does not hold",
            problems=broken,
            hint="What was saved before is kept. Loosen the condition, or the step.",
        )
    return ", ".join(said)
