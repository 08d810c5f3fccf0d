"""Files that a recipe reads and that are not there: all of them, each with its line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_compose.errors import OptionError
from moe_compose.recipe.reading import Recipe, RecipeStep
from moe_compose.recipe.state import place_of


def missing_files(recipe: Recipe) -> None:
    """Look for every file of text, of statistics, and others that no earlier step makes.

    Raises:
        OptionError: some are not there.
    """
    made: set[str] = set()
    problems = []
    for step in recipe.steps:
        for name, path in _read_by(step):
            if place_of(path) not in made and not path.expanduser().exists():
                problems.append(f"{step.lines.get(name, step.place)}: there is no {path}")
        made |= {place_of(v) for n, v in step.given.items() if _kind(step, n) in ("save", "out")}
    if recipe.data is not None and not recipe.data.expanduser().exists():
        problems.append(f"data: there is no {recipe.data}")
    if problems:
        raise OptionError("the recipe needs files that are not there", problems=problems)


def _read_by(step: RecipeStep) -> Iterator[tuple[str, Path]]:
    for name, value in step.given.items():
        kind = _kind(step, name)
        if kind == "texts":
            yield from ((name, p) for p in _paths(value))
        elif kind in ("file", "stats"):
            yield name, value
    yield from (("assert", p) for p in _paths(step.conditions.get("data", ())))


def _kind(step: RecipeStep, name: str) -> str:
    return step.step.inputs[name].kind


def _paths(words: tuple[str, ...]) -> Iterator[Path]:
    for word in words:
        file = word.partition("=")[2] or word
        if not file.startswith("hf:"):
            yield Path(file)
