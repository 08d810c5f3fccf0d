"""A recipe carried out.

First all of it is rehearsed: files are looked for, models opened, plans built from headers, places
checked. So what is wrong with the last step is said before the first one takes hours.

Plans stay plans: a step starts from the plan of the one before, so nothing is written between them
unless `save` says so; calibrations, conditions and training run a plan as they run a checkpoint.
What takes long leaves in `OUTPUT.run/` what it can resume from, until the last result is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.sharding import SHARD_SIZE
from moe_compose.errors import MoeComposeError, OptionError, WriteError
from moe_compose.recipe.conditions import check_conditions
from moe_compose.recipe.missing import missing_files
from moe_compose.recipe.reading import Recipe, RecipeStep
from moe_compose.recipe.state import State, Watch, Written

if TYPE_CHECKING:
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.surgery.plan import Plan
    from moe_compose.validation.report import ValidationReport


def rehearse(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, watch: Watch | None = None
) -> None:
    """Go through a recipe without reading a weight, measuring or writing anything.

    Plans have the names and shapes of the real ones; what depends on text stands for what will be
    measured.

    Args:
        recipe: what `read_recipe` gave.
        resume: as for `run_recipe`.
        overwrite: as for `run_recipe`.
        watch: is told of every plan.

    Raises:
        MoeComposeError: files that are not there, all of them; or a step that cannot be carried
            out, or a place that is not free.
    """
    from moe_compose.reporting.hub import check_repo

    missing_files(recipe)
    if recipe.push_to_hub is not None:
        check_repo(recipe.push_to_hub)
    elif recipe.private:
        raise OptionError("private has no meaning without push_to_hub: ORG/NAME")
    state = State(dry=True, resume=resume, overwrite=overwrite, watch=watch or Watch())
    _Run(recipe, state).through()


def run_recipe(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, watch: Watch | None = None
) -> list[Written]:
    """Carry a recipe out.

    Args:
        recipe: what `read_recipe` gave.
        resume: go on with what an interrupted run has left: layers of calibrations, states of
            trainings, rounds of evaluations, files of weights.
        overwrite: replace results that are there.
        watch: is told of every step.

    Returns:
        What was written, the last result last.

    Raises:
        MoeComposeError: a step that cannot be carried out, or a condition that does not hold; the
            message names the step. What was saved before stays.
    """
    rehearse(recipe, resume=resume, overwrite=overwrite)
    with _work_folder(recipe, resume, overwrite) as folder:
        state = State(resume=resume, overwrite=overwrite, watch=watch or Watch())
        run = _Run(recipe, state, folder)
        run.through()
        run.push()
        return run.written


@contextmanager
def _work_folder(recipe: Recipe, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Where steps keep what they can resume from; it stays if the run does not come to its end."""
    if recipe.output is None:
        with tempfile.TemporaryDirectory(prefix="moe-compose-") as name:
            yield Path(name)
        return
    whole = recipe.output.absolute()
    folder = whole.with_name(f"{whole.name}.run")
    if folder.exists() and not resume:
        if not overwrite:
            raise WriteError(
                f"{folder.name} holds a run that was interrupted",
                hint="Continue it with --resume, or start again with --overwrite.",
            )
        shutil.rmtree(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class _Run:
    """One run, or one rehearsal."""

    def __init__(self, recipe: Recipe, state: State, folder: Path | None = None) -> None:
        self._recipe, self._state, self._folder = recipe, state, folder
        self.written: list[Written] = []

    def through(self) -> None:
        """All steps; an error names its step."""
        for i, step in enumerate(self._recipe.steps):
            try:
                self._step(i, step)
            except MoeComposeError as error:
                where = f"{step.place} ({step.operation}): {error.message}"
                raise type(error)(where, problems=error.problems, hint=error.hint) from error

    def _step(self, index: int, step: RecipeStep) -> None:
        """Carry one step out, hold its result to the conditions, and write it where it is asked."""
        state, watch = self._state, self._state.watch
        watch.begins(index, step.operation)
        if self._folder is not None:
            state.folder = self._folder / f"{index}-{step.operation}"
        started = state.source(step.given) if "source" in step.step.inputs else state.model
        before = state.before if step.step.mends else started
        made = step.step.act(state, step.options, step.given)
        if step.step.makes != "plan":
            self._found(index, step, made)
            return
        before = before or next(iter(made.sources.values()))
        watch.planned(index, made)
        if step.conditions and (said := check_conditions(state, made, before, step.conditions)):
            watch.holds(index, said)
        state.model, state.before = made, before
        places = [step.given["save"]] if "save" in step.given else []
        places += [self._recipe.output] if index == self._recipe.last else []
        for place in places:
            self._place(index, made, place, before)
        state.results.append(state.model)

    def _found(self, index: int, step: RecipeStep, made: Any) -> None:
        """A step that makes no model leaves the last one as it was."""
        if not self._state.dry:
            self._state.watch.found(index, step.operation, made)
        elif "save" in step.given:
            self._state.promised[str(step.given["save"])] = made
        self._state.results.append(self._state.model)

    def _place(self, index: int, plan: Plan, folder: Path, before: TensorSource) -> None:
        """Write a result; in a rehearsal, see whether it may be written."""
        from moe_compose.reporting.publish import check_destination

        state, shard_size = self._state, self._recipe.shard_size or SHARD_SIZE
        if not state.dry:
            self._write(index, plan, folder, before, shard_size)
            return
        if not state.resume:  # what is there may be of the real plan, whose digest is not known
            check_destination(plan, folder, shard_size=shard_size, overwrite=state.overwrite)
        state.promised[str(folder)] = plan

    def _write(
        self, index: int, plan: Plan, folder: Path, before: TensorSource, shard_size: int
    ) -> None:
        from moe_compose.reporting.publish import write
        from moe_compose.validation import preflight

        state = self._state
        if self._recipe.validate:
            preflight(plan)
        with state.watch.counting(f"writing {folder.name}") as count:
            checkpoint = write(
                plan,
                folder,
                shard_size=shard_size,
                resume=state.resume,
                overwrite=state.overwrite,
                progress=count and (lambda p: count(p.bytes_done, p.bytes_total)),
            )
        report = self._validate(index, checkpoint, plan, before) if self._recipe.validate else None
        done = Written(step=index, folder=folder, checkpoint=checkpoint, report=report)
        self.written.append(done)
        state.model = checkpoint
        state.watch.written(done)

    def _validate(
        self, index: int, checkpoint: Checkpoint, plan: Plan, before: TensorSource
    ) -> ValidationReport:
        from moe_compose.recipe.recovery import compared_on
        from moe_compose.reporting.publish import record_validation
        from moe_compose.validation import validate

        step = self._recipe.steps[index]
        text = compared_on(step.given) if step.operation == "prune" else None
        stated = plan.sources.get(plan.preservation.reference)
        with self._state.watch.waiting(f"validating {checkpoint.label} against {before.label}"):
            report = validate(
                checkpoint,
                against=stated or before,
                preservation=plan.preservation,
                data=text or self._recipe.data,
            )
            record_validation(checkpoint, plan, report)
        return report

    def push(self) -> None:
        """The last result to the Hub, if it is to be there, and valid."""
        from moe_compose.reporting.hub import push

        repo, watch = self._recipe.push_to_hub, self._state.watch
        if repo is None:
            return
        done = self.written[-1]
        if done.report is not None and not done.report.ok:
            watch.remark(f"{done.checkpoint.label} is not pushed to {repo}: it is not valid")
            return
        with watch.waiting(f"pushing {done.checkpoint.label} to {repo}"):
            url = push(done.checkpoint, repo, private=self._recipe.private)
        self.written[-1] = replace(done, pushed=url)
        watch.remark(f"On the Hub: {url}")
