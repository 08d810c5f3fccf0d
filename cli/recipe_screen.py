"""A recipe, as screens: what it would do, and what it does while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from moe_compose.recipe.state import Watch, Written
from moe_compose.reporting.documents import plain
from moe_compose.reporting.inspect import inspect
from moe_compose.reporting.units import bytes_text, count

from .commands._steps import Shown
from .output import out
from .plan_screen import plan_screen, short
from .screens import facts, report_screen, title

if TYPE_CHECKING:
    from moe_compose.recipe.reading import Recipe, RecipeStep
    from moe_compose.surgery.plan import Plan


class Rehearsed(Watch):
    """Remembers the plans of a rehearsal."""

    def __init__(self) -> None:
        self.plans: dict[int, Plan] = {}

    def planned(self, step: int, plan: Plan) -> None:
        """Remember it."""
        self.plans[step] = plan

    def document(self, recipe: Recipe) -> dict[str, Any]:
        """For programs."""
        steps = []
        for i, step in enumerate(recipe.steps):
            said = {"operation": step.operation, **_parts(step)}
            if (plan := self.plans.get(i)) is not None:
                summary = plan.summary()
                said["result"] = {
                    "parameters": summary.parameters.total,
                    "active": summary.parameters.active,
                    "bytes": summary.bytes,
                }
            steps.append(said)
        output = None if recipe.output is None else str(recipe.output)
        return {"dry_run": True, "steps": steps, "output": output}


def _parts(step: RecipeStep) -> dict[str, dict[str, Any]]:
    """Options, inputs and conditions as plain values."""
    options = {} if step.options is None else asdict(step.options)
    return {
        "inputs": plain(dict(step.given)),
        "options": plain({f.name: options[f.name] for f in step.step.fields}),
        "assert": plain(dict(step.conditions)),
    }


def recipe_screen(recipe: Recipe, plans: Mapping[int, Plan]) -> RenderableType:
    """Every step: what it is told, what it takes by default, and what it would make."""
    parts: list[RenderableType] = []
    for i, step in enumerate(recipe.steps):
        rows: list[tuple[str, RenderableType]] = [*_told(step)]
        if (plan := plans.get(i)) is not None:
            rows.append(("→", Text(_result(plan), style="bold")))
        gap: list[RenderableType] = [Text("")] if i else []
        parts += [*gap, title(f"{i}  {step.operation}", step.step.summary), facts(rows)]
    return Group(*parts)


def _told(step: RecipeStep) -> Iterator[tuple[str, str]]:
    found, usual = _parts(step), {f.name: plain(f.default) for f in step.step.fields}
    said = {n: v for n, v in found["options"].items() if v != usual[n]}
    yield from ((name, _text(value)) for name, value in (found["inputs"] | said).items())
    if found["assert"]:
        yield "assert", ", ".join(f"{n} {_text(v)}" for n, v in found["assert"].items())
    silent = {n: v for n, v in found["options"].items() if n not in said and v not in (None, [])}
    if silent:
        yield "by default", ", ".join(f"{n} {_text(v)}" for n, v in silent.items())


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _result(plan: Plan) -> str:
    """A model that is not there yet, in a line."""
    summary = plan.summary()
    size = f"{count(summary.parameters.total)} parameters, {bytes_text(summary.bytes)}"
    return f"{short(inspect(plan))}; {size}"


class Followed(Shown):
    """A run on the screen, step by step."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.findings: list[dict[str, Any]] = []
        self.sound = True

    def begins(self, step: int, operation: str) -> None:
        """A line."""
        out.hint(f"step {step + 1} of {len(self._recipe.steps)}: {operation}")

    def planned(self, step: int, plan: Plan) -> None:
        """The screen of the plan."""
        last = self._recipe.output if step == self._recipe.last else None
        where = self._recipe.steps[step].given.get("save") or last or "(next step)"
        out.show(plan_screen(plan, str(where)))

    def holds(self, step: int, said: str) -> None:
        """A line."""
        out.show(Text(f"✓ {said}"))

    def found(self, step: int, operation: str, result: Any) -> None:
        """The screen of the command of that name; figures are kept, for programs."""
        said = _document_of(operation, result)
        self.findings.append({"step": step, "operation": operation, "result": said})
        if operation == "evaluate" and not result.finite:
            self.sound = False
            out.warn("the loss is not finite: a weight is NaN or infinite, or overflows")
        for screen in _screens(operation, result):
            out.show(screen)

    def written(self, done: Written) -> None:
        """Where, and what validation says of it."""
        out.show(Text(f"written: {done.folder}"))
        if done.report is not None:
            out.show(report_screen(done.report))


def _document_of(operation: str, result: Any) -> Any:
    """What the command of this name tells programs."""
    if operation == "calibrate":
        from moe_compose.calibration.summary import to_json

        return to_json(result)
    if operation == "pack-expert":
        from .pack_screen import packed

        return packed(result)
    return str(result) if isinstance(result, Path) else result.to_json()


def _screens(operation: str, result: Any) -> Iterator[RenderableType]:
    """What the command of this name shows."""
    if operation == "calibrate":
        from .stats_screen import stats_screen

        yield stats_screen(result)
    elif operation == "evaluate":
        from .evaluation_screen import evaluation_screen

        yield evaluation_screen(result)
    elif operation == "sweep":
        from .recovery_screen import sweep_screen

        yield sweep_screen(result)
    elif operation == "quant-plan":
        from .quant_screen import quant_screen

        yield quant_screen(result)
    elif operation == "pack-expert":
        from .pack_screen import pack_screen

        yield pack_screen(result)
    elif isinstance(result, Path):
        yield Text(f"written: {result}")
