"""YAML → a recipe. Every fault has its file, line and place, and what was probably meant.

steps:
  - operation: upcycle
    source: models/seed
    num_experts: 8
  - operation: prune
    keep: 6
    criterion: random
    assert: {max_kl: 0.05, data: held-out.txt}
output: out/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moe_compose.errors import MoeComposeError, OptionError
from moe_compose.recipe.inputs import Input
from moe_compose.recipe.steps import STEPS, Step, inputs_of
from moe_compose.recipe.values import converted, hints_of, names_of, required
from moe_compose.surgery.yaml_lines import Entry, read_yaml

#: What a recipe has beside its steps.
TOP: Mapping[str, Input] = {
    "output": Input("folder", "Where the last result is written.", required=True),
    "validate": Input("flag", "Check every result that is written."),
    "shard_size": Input("whole", "Largest file of weights, in bytes."),
}

#: What a condition may demand.
CONDITIONS: Mapping[str, Input] = {
    "max_kl": Input("number", "Largest mean KL to what the step started from, nats per token."),
    "max_loss": Input("number", "Largest held-out loss, nats per token."),
    "data": Input("texts", "Held-out text.", required=True),
    "tokens": Input("whole", "Tokens of it."),
}


@dataclass(frozen=True, kw_only=True)
class RecipeStep:
    """A step of a recipe.

    Attributes:
        place: where it stands, for messages: `recipe.yaml:5  steps.0`.
        operation: its name.
        options: an instance of its options dataclass.
        given: what it reads beside them.
        conditions: what must hold of its result; empty: nothing.
    """

    place: str
    operation: str
    options: Any
    given: Mapping[str, Any]
    conditions: Mapping[str, Any]

    @property
    def step(self) -> Step:
        """Its kind."""
        return STEPS[self.operation]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Operations, one after another.

    Attributes:
        steps: what is done.
        output: folder of the last result.
        validate: every result that is written is checked.
        shard_size: bytes of a file of weights; None: as usual.
    """

    steps: tuple[RecipeStep, ...]
    output: Path
    validate: bool = True
    shard_size: int | None = None


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a file.

    Args:
        path: YAML.
        changes: `steps.0.top_k=4`: entries that are set, the value in YAML.

    Raises:
        OptionError: unreadable, or faulty: every fault with its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f"cannot read {path}: {e}") from e
    return parse_recipe(text, path.name, changes)


def parse_recipe(text: str, where: str = "recipe", changes: Sequence[str] = ()) -> Recipe:
    """A recipe from text; see `read_recipe`."""
    root = read_yaml(text, where)
    for change in changes:
        _set(root, change)
    reader = _Reader(where)
    recipe = reader.recipe(root)
    if reader.problems or recipe is None:
        raise OptionError(f"{where} is no recipe", problems=reader.problems)
    return recipe


def _set(root: Entry, change: str) -> None:
    """Set one entry in place."""
    path, equals, value = change.partition("=")
    steps = path.split(".")
    if not equals or not all(steps):
        raise OptionError(f"--set {change}: it must be PATH=VALUE, such as steps.0.top_k=4")
    node = root.value
    for step in steps[:-1]:
        found = _child(node, step)
        if found is None:
            raise OptionError(f"--set {change}: the recipe has no {step}")
        node = found.value
    entry = Entry(0, read_yaml(value, f"--set {change}").value)
    if isinstance(node, dict):
        node[steps[-1]] = entry
    elif isinstance(node, list) and _child(node, steps[-1]) is not None:
        node[int(steps[-1])] = entry
    else:
        raise OptionError(f"--set {change}: the recipe has no {path}")


def _child(node: Any, step: str) -> Entry | None:
    if isinstance(node, dict):
        return node.get(step)
    if isinstance(node, list) and step.isdecimal() and int(step) < len(node):
        found: Entry = node[int(step)]
        return found
    return None


def plain(value: Any) -> Any:
    """Entries as plain values, lines left out."""
    if isinstance(value, Entry):
        return plain(value.value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


class _Reader:
    """One reading under way."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.problems: list[str] = []

    def _say(self, line: int, place: str, what: str) -> None:
        at = f"{self._where}:{line}" if line else "--set"
        self.problems.append(f"{at}  {place}: {what}" if place else f"{at}  {what}")

    def _unknown(self, line: int, place: str, name: str, known: Sequence[str]) -> None:
        close = get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        self._say(line, place, f"unknown option {name!r}; {hint}")

    def recipe(self, root: Entry) -> Recipe | None:
        """The whole; None where something is wrong."""
        if not isinstance(root.value, dict):
            self._say(root.line or 1, "", "a recipe is a mapping with steps and output")
            return None
        for name, entry in root.value.items():
            if name not in ("steps", *TOP):
                self._unknown(entry.line, name, name, ["steps", *TOP])
        top = dict(self._inputs(root, "", TOP))
        listed = root.value.get("steps", Entry(root.line or 1, None))
        if not isinstance(listed.value, list) or not listed.value:
            self._say(listed.line, "steps", "must be a list of steps")
            return None
        steps = [self._step(e, f"steps.{i}", i) for i, e in enumerate(listed.value)]
        if self.problems:
            return None
        return Recipe(steps=tuple(s for s in steps if s is not None), **top)

    def _inputs(
        self, entry: Entry, place: str, known: Mapping[str, Input]
    ) -> Iterator[tuple[str, Any]]:
        for name, how in known.items():
            found = entry.value.get(name)
            here = f"{place}.{name}" if place else name
            if found is None:
                if how.required:
                    self._say(entry.line or 1, here, f"is missing: {how.help}")
                continue
            try:
                yield name, how.read(plain(found))
            except ValueError as e:
                self._say(found.line, here, f"must be {e} ({plain(found)!r})")

    def _step(self, entry: Entry, place: str, index: int) -> RecipeStep | None:
        if not isinstance(entry.value, dict):
            self._say(entry.line, place, "must be a mapping with an operation")
            return None
        named = entry.value.get("operation", Entry(entry.line, None))
        if named.value not in STEPS:
            self._say(named.line, f"{place}.operation", self._which(named.value))
            return None
        step, inputs = STEPS[named.value], inputs_of(STEPS[named.value])
        cls = step.options_class
        own = names_of(cls) if cls is not None else ()
        known = [*own, *inputs, "assert"]
        for name, value in entry.value.items():
            if name != "operation" and name not in known:
                self._unknown(value.line, f"{place}.{name}", name, known)
        given = dict(self._inputs(entry, place, inputs))
        if index == 0 and "source" not in given and "base" not in inputs:
            self._say(entry.line, f"{place}.source", "is missing: the first step needs one")
        options = self._options(entry, place, cls)
        return RecipeStep(
            place=f"{self._where}:{entry.line}  {place}",
            operation=str(named.value),
            options=options,
            given=given,
            conditions=self._conditions(entry, place, step),
        )

    def _which(self, name: Any) -> str:
        close = get_close_matches(str(name), list(STEPS), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(STEPS)}"
        return f"{'is missing' if name is None else f'unknown operation {name!r}'}; {hint}"

    def _options(self, entry: Entry, place: str, cls: type | None) -> Any:
        if cls is None:
            return None
        values, hints, before = {}, hints_of(cls), len(self.problems)
        for f in fields(cls):
            found = entry.value.get(f.name)
            if found is None:
                if required(f):
                    self._say(entry.line, f"{place}.{f.name}", "is missing")
                continue
            try:
                values[f.name] = converted(plain(found), hints[f.name])
            except ValueError as e:
                self._say(found.line, f"{place}.{f.name}", f"must be {e} ({plain(found)!r})")
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except MoeComposeError as e:
            for problem in e.problems or [e.message]:
                self._say(entry.line, place, problem)
            return None

    def _conditions(self, entry: Entry, place: str, step: Step) -> dict[str, Any]:
        found = entry.value.get("assert")
        if found is None:
            return {}
        here = f"{place}.assert"
        if step.makes != "plan" or not isinstance(found.value, dict):
            self._say(found.line, here, "must be conditions of a step that makes a model")
            return {}
        for name, value in found.value.items():
            if name not in CONDITIONS:
                self._unknown(value.line, f"{here}.{name}", name, list(CONDITIONS))
        return dict(self._inputs(found, here, CONDITIONS))
