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

from moe_compose.checkpoint.copying import os_errors
from moe_compose.checkpoint.sharding import SHARD_SIZE
from moe_compose.errors import MoeComposeError, OptionError, WriteError
from moe_compose.recipe.conditions import check_conditions
from moe_compose.recipe.missing import missing_files
from moe_compose.recipe.reading import Recipe, RecipeStep
from moe_compose.recipe.state import State, Watch, Written, place_of

if TYPE_CHECKING:
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.surgery.plan import Plan
    from moe_compose.validation.report import ValidationReport


#: In a folder of `OUTPUT.run`, that says it is one.
_MARK = ".recipe"


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
    _check_work(recipe, resume, overwrite)
    if recipe.push_to_hub is not None:
        check_repo(recipe.push_to_hub)
    elif recipe.private:
        raise OptionError("private has no meaning without push_to_hub: ORG/NAME")
    state = State(dry=True, resume=resume, overwrite=overwrite, watch=watch or Watch())
    _Run(recipe, state).through()


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    push: bool = True,
    watch: Watch | None = None,
) -> list[Written]:
    """Carry a recipe out.

    Args:
        recipe: what `read_recipe` gave.
        resume: go on with what an interrupted run has left: layers of calibrations, states of
            trainings, files of weights, and rounds of evaluations that have an `out`.
        overwrite: replace results that are there.
        push: upload the last result, where the recipe says so.
        watch: is told of every step.

    Returns:
        What was written, the last result last.

    Raises:
        ConditionError: a condition does not hold. What was saved before stays, as after any error.
        MoeComposeError: a step that cannot be carried out; the message names the step.
    """
    rehearse(recipe, resume=resume, overwrite=overwrite)
    with _work_folder(recipe, resume, overwrite) as folder:
        state = State(resume=resume, overwrite=overwrite, watch=watch or Watch())
        run = _Run(recipe, state, folder)
        run.through()
    if push and recipe.push_to_hub is not None:
        run.written[-1] = push_last(recipe, run.written[-1], watch)
    return run.written


def push_last(recipe: Recipe, done: Written, watch: Watch | None = None) -> Written:
    """Upload a recipe's last result, if it is valid; with its address.

    Raises:
        WriteError: it cannot be uploaded; the folder stays.
    """
    from moe_compose.reporting.hub import push

    repo, watch = recipe.push_to_hub, watch or Watch()
    assert repo is not None
    if done.report is not None and not done.report.ok:
        watch.remark(f"{done.checkpoint.label} is not pushed to {repo}: it is not valid")
        return done
    with watch.waiting(f"pushing {done.checkpoint.label} to {repo}"):
        url = push(done.checkpoint, repo, private=recipe.private)
    watch.remark(f"On the Hub: {url}")
    return replace(done, pushed=url)


def _check_work(recipe: Recipe, resume: bool, overwrite: bool) -> Path | None:
    """Where steps keep what they can resume from; None where no step makes a model.

    Raises:
        WriteError: it is there, and neither to be taken up nor to be replaced; or it is no run's.
    """
    if recipe.output is None:
        return None
    whole = recipe.output.expanduser().absolute()
    folder = whole.with_name(f"{whole.name}.run")
    if folder.exists() and not (folder / _MARK).is_file():
        raise WriteError(
            f"{folder} is there, and holds no run of a recipe",
            hint="Give another output, or move that folder away.",
        )
    if folder.exists() and not resume and not overwrite:
        raise WriteError(
            f"{folder.name} holds a run that was interrupted",
            hint="Continue it with --resume, or start again with --overwrite.",
        )
    return folder


@contextmanager
def _work_folder(recipe: Recipe, resume: bool, overwrite: bool) -> Iterator[Path]:
    """It stays if the run does not come to its end, and there is something in it."""
    folder = _check_work(recipe, resume, overwrite)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="moe-compose-") as name:
            yield Path(name)
        return
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    with os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
    try:
        yield folder
    except BaseException:
        if [p.name for p in folder.iterdir()] == [_MARK]:
            shutil.rmtree(folder)
        raise
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
        started = state.source(step.given) if "source" in step.step.inputs else None
        before = state.before if step.step.mends else started
        made = step.step.act(state, step.options, step.given)
        if step.step.makes != "plan":
            self._found(index, step, made)
            return
        before = before or made.reference
        watch.planned(index, made)
        if step.conditions and (said := check_conditions(state, made, before, step.conditions)):
            watch.holds(index, said)
        state.model, state.before, state.saved = made, before, False
        places = [step.given["save"]] if "save" in step.given else []
        if index == self._recipe.last and self._recipe.output is not None:
            places.append(self._recipe.output)
        for place in {place_of(p): p for p in places}.values():
            self._place(index, made, place, before)
            state.saved = True
        state.results.append(state.model)

    def _found(self, index: int, step: RecipeStep, made: Any) -> None:
        """A step that makes no model leaves the last one as it was."""
        if not self._state.dry:
            self._state.watch.found(index, step.operation, made)
        else:
            for name in ("save", "out"):
                self._promise(step.given.get(name), made if name == "save" else None)
        self._state.results.append(self._state.model)

    def _promise(self, path: Path | None, made: TensorSource | None) -> None:
        """In a rehearsal: a step will write there.

        Raises:
            OptionError: an earlier one does.
        """
        if path is None:
            return
        if place_of(path) in self._state.promised:
            raise OptionError(f"an earlier step writes {path} too", hint="Give each its own place.")
        self._state.promised[place_of(path)] = made

    def _place(self, index: int, plan: Plan, folder: Path, before: TensorSource) -> None:
        """Write a result; in a rehearsal, see whether it may be written."""
        from moe_compose.reporting.publish import check_destination
        from moe_compose.validation.text import read_text

        state, shard_size = self._state, self._recipe.shard_size or SHARD_SIZE
        if not state.dry:
            self._write(index, plan, folder, before, shard_size)
            return
        if (text := self._text(index)) is not None:
            read_text(text)
        if not state.resume:  # what is there may be of the real plan, whose digest is not known
            check_destination(plan, folder, shard_size=shard_size, overwrite=state.overwrite)
        self._promise(folder, plan)

    def _write(
        self, index: int, plan: Plan, folder: Path, before: TensorSource, shard_size: int
    ) -> None:
        from moe_compose.reporting.publish import write
        from moe_compose.validation import preflight

        state = self._state
        if self._recipe.validate:
            preflight(plan)
        with state.writing(folder) as progress:
            checkpoint = write(
                plan,
                folder,
                shard_size=shard_size,
                resume=state.resume,
                overwrite=state.overwrite,
                progress=progress,
            )
        report = self._validate(index, checkpoint, plan, before) if self._recipe.validate else None
        done = Written(step=index, folder=folder, checkpoint=checkpoint, report=report)
        self.written.append(done)
        state.model = checkpoint
        state.watch.written(done)

    def _text(self, index: int) -> Path | None:
        """What a result is compared with its source on; None: the bundled sample."""
        step = self._recipe.steps[index]
        return step.step.compared_on(step.given) or self._recipe.data

    def _validate(
        self, index: int, checkpoint: Checkpoint, plan: Plan, before: TensorSource
    ) -> ValidationReport:
        from moe_compose.reporting.publish import record_validation
        from moe_compose.validation import validate

        against = plan.reference if plan.preservation.reference else before
        with self._state.watch.waiting(f"validating {checkpoint.label} against {against.label}"):
            report = validate(
                checkpoint,
                against=against,
                preservation=plan.preservation,
                data=self._text(index),
            )
            record_validation(checkpoint, plan, report)
        return report
