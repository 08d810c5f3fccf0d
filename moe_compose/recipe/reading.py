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
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moe_compose.errors import MoeComposeError, OptionError
from moe_compose.recipe.inputs import Input
from moe_compose.recipe.steps import STEPS, Step
from moe_compose.recipe.values import converted, hints_of, required
from moe_compose.surgery.yaml_lines import Entry, read_yaml

#: What a recipe has beside its steps.
TOP: Mapping[str, Input] = {
    "output": Input("save", "Where the last result is written."),
    "validate": Input("flag", "Check every result that is written."),
    "data": Input("file", "Text that results are compared with their source on."),
    "shard_size": Input("bytes", "Largest file of weights: 5GB, 500MB, or bytes."),
    "push_to_hub": Input("text", "ORG/NAME: upload the last result, if it is valid."),
    "private": Input("flag", "Of a repository that is made: private."),
}

#: What a condition may demand.
CONDITIONS: Mapping[str, Input] = {
    "max_kl": Input("number", "Largest mean KL to a reference, nats per token."),
    "min_top1": Input("number", "Least share of tokens whose likeliest next is the reference's."),
    "max_loss": Input("number", "Largest held-out loss, nats per token."),
    "max_kl_worst": Input("number", "Largest mean KL of any domain."),
    "min_top1_worst": Input("number", "Least such share of any domain."),
    "max_loss_worst": Input("number", "Largest held-out loss of any domain."),
    "against": Input("model", "The reference; by default what the step started from."),
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
        lines: key → where that stands.
    """

    place: str
    operation: str
    options: Any
    given: Mapping[str, Any]
    conditions: Mapping[str, Any]
    lines: Mapping[str, str] = field(default_factory=dict)

    @property
    def step(self) -> Step:
        """Its kind."""
        return STEPS[self.operation]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Operations, one after another.

    Attributes:
        steps: what is done.
        output: folder of the last result; None: no step makes a model.
        validate: every result that is written is checked.
        data: text that results are compared on; None: the bundled sample.
        shard_size: bytes of a file of weights; None: as usual.
        push_to_hub: where the last result is uploaded to, if anywhere.
        private: whether a repository that is made is private.
    """

    steps: tuple[RecipeStep, ...]
    output: Path | None
    validate: bool = True
    data: Path | None = None
    shard_size: int | None = None
    push_to_hub: str | None = None
    private: bool = False

    @property
    def last(self) -> int:
        """The last step that makes a model; -1: none does."""
        making = [i for i, step in enumerate(self.steps) if step.step.makes == "plan"]
        return making[-1] if making else -1


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
        why = e.strerror if isinstance(e, OSError) else "it is no UTF-8 text"
        raise OptionError(f"cannot read {path}: {why}") from e
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
        found = Recipe(steps=tuple(s for s in steps if s), **{"output": None, **top})
        if None not in steps and found.last >= 0 and found.output is None:
            self._say(root.line or 1, "output", f"is missing: {TOP['output'].help}")
        if None not in steps and found.last < 0 and found.output is not None:
            self._say(root.value["output"].line, "output", "no step makes a model to write there")
        return None if self.problems else found

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
        step = STEPS[named.value]
        inputs = step.inputs
        known = [*(f.name for f in step.fields), *inputs]
        known += ["assert"] if step.makes == "plan" else []
        for name, value in entry.value.items():
            if name != "operation" and name not in known:
                self._unknown(value.line, f"{place}.{name}", name, known)
        given = dict(self._inputs(entry, place, inputs))
        if index == 0 and "source" not in given and "source" in inputs:
            self._say(entry.line, f"{place}.source", "is missing: the first step needs one")
        options = self._options(entry, place, step)
        return RecipeStep(
            place=f"{self._where}:{entry.line}  {place}",
            operation=str(named.value),
            options=options,
            given=given,
            conditions=self._conditions(entry, place),
            lines={
                name: f"{self._where}:{value.line}  {place}.{name}" if value.line else place
                for name, value in entry.value.items()
            },
        )

    def _which(self, name: Any) -> str:
        close = get_close_matches(str(name), list(STEPS), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(STEPS)}"
        return f"{'is missing' if name is None else f'unknown operation {name!r}'}; {hint}"

    def _options(self, entry: Entry, place: str, step: Step) -> Any:
        cls = step.options_class
        if cls is None:
            return None
        values, hints, before = {}, hints_of(cls), len(self.problems)
        for f in step.fields:
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

    def _conditions(self, entry: Entry, place: str) -> dict[str, Any]:
        found = entry.value.get("assert")
        if found is None:
            return {}
        here = f"{place}.assert"
        if not isinstance(found.value, dict):
            self._say(found.line, here, "must be a mapping, such as {max_kl: 0.05, data: FILE}")
            return {}
        for name, value in found.value.items():
            if name not in CONDITIONS:
                self._unknown(value.line, f"{here}.{name}", name, list(CONDITIONS))
        return dict(self._inputs(found, here, CONDITIONS))
