"""Configs of mergekit-moe, the tool that many mixtures of fine-tunes were made with.

What both tools can do is taken over: the base gives everything but the experts, and is no expert
itself; `random` rows are N(0, 1); for `hidden`, an expert's positive prompts become its text, rows
have length 1. One thing is not the same on purpose: there `hidden` is the residual stream at the
last token of a prompt, before attention; here it is what the router is really given, the mean over
all tokens. Everything else is named, with what to do instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_compose.architectures import all_architectures
from moe_compose.errors import OptionError
from moe_compose.surgery.compose_options import ComposeOptions, RouterStart
from moe_compose.surgery.yaml_lines import Entry, read_yaml

#: Routers that both tools have: theirs → ours.
GATES: Mapping[str, RouterStart] = {
    "hidden": "hidden",
    "hidden_avg": "hidden",
    "random": "random",
}

_TOP = (
    *("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture"),
    "shared_experts",
)
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")

#: What has no counterpart, and what to do about it.
_INSTEAD = {
    "negative_prompts": "leave them out; --router ridge tells each expert's text from the others'",
    "noise_scale": "leave it out, and train: no noise is put on experts that differ already",
    "residual_scale": "leave it out; experts compute what their models' FFNs do",
    "shared_experts": "list them under experts, or leave them out",
    "cheap_embed": "use hidden, or --router domain with embeddings (--embeddings FILE)",
    "uniform_random": "use random, and --router-std for how large the rows are",
    "hidden_last": "use hidden: what the router is given, the mean over all tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MergekitConfig:
    """What a config of mergekit-moe asks for.

    Attributes:
        base: the model that gives everything but the experts.
        experts: name, made from the model's → the model, as `Donor.parse` takes it.
        options: of the composition.
        texts: name → prompts, where router rows follow from them.
    """

    base: str
    experts: Mapping[str, str]
    options: ComposeOptions
    texts: Mapping[str, tuple[str, ...]]


def read_mergekit(text: str, where: str = "config") -> MergekitConfig:
    """Read a config of mergekit-moe.

    Args:
        text: YAML.
        where: what errors call it.

    Raises:
        OptionError: no YAML, unknown keys, values that cannot be meant, and all that has no
            counterpart here, each with its line; all at once.

    Example:
        >>> config = read_mergekit('''
        ... base_model: org/seed
        ... gate_mode: random
        ... experts:
        ...   - source_model: org/math
        ...   - source_model: other/math
        ... ''')
        >>> config.experts
        {'math': 'org/math', 'math-2': 'other/math'}
    """
    reading = _Reading(where)
    found = reading.config(read_yaml(text, where))
    if found is None or reading.problems:
        raise OptionError(
            f"{where} cannot be taken over from mergekit-moe", problems=reading.problems
        )
    return found


class _Reading:
    """One config being read; `problems` gathers what is wrong with it."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.problems: list[str] = []

    def config(self, root: Entry) -> MergekitConfig | None:
        """What is asked for; None where too little of it is there."""
        if not isinstance(root.value, dict):
            self._wrong(root, "config", "must be a mapping with base_model and experts")
            return None
        top = self._known(root.value, _TOP, "")
        gate = self._gate(top)
        base = self._text(top, "base_model", "", root)
        experts = list(self._experts(top, root, gate))
        names = names_of_models([model for model, _ in experts])
        if base is None or not experts:
            return None
        options = ComposeOptions(
            top_k=self._top_k(top),
            base_expert=False,
            shared="base",
            router=gate,
            router_std=1.0 if gate == "random" else None,
            target=self._target(top),
            dtype=self._dtype(top),
        )
        return MergekitConfig(
            base=base,
            experts={n: model for n, (model, _) in zip(names, experts, strict=True)},
            options=options,
            texts={
                n: prompts
                for n, (_, prompts) in zip(names, experts, strict=True)
                if gate == "hidden"
            },
        )

    def _known(
        self, entries: dict[str, Entry], names: tuple[str, ...], at: str
    ) -> dict[str, Entry]:
        """Entries that say something; unknown ones, and those without a counterpart, are told."""
        said = {}
        for name, entry in entries.items():
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                instead = f" (did you mean {close[0]!r}?)" if close else ""
                self._wrong(entry, at + name, f"unknown key{instead}")
            elif entry.value in (None, [], {}) or (name in _INSTEAD and entry.value == 0):
                continue
            elif name in _INSTEAD:
                self._wrong(entry, at + name, f"has no counterpart here: {_INSTEAD[name]}")
            else:
                said[name] = entry
        return said

    def _gate(self, top: dict[str, Entry]) -> RouterStart:
        entry = top.get("gate_mode", Entry(0, "hidden"))
        if isinstance(entry.value, str) and entry.value in GATES:
            return GATES[entry.value]
        instead = _INSTEAD.get(str(entry.value), f"it must be one of {', '.join(GATES)}")
        self._wrong(entry, "gate_mode", f"{_shown(entry.value)} has no counterpart: {instead}")
        return "zeros"  # asks for no prompts

    def _experts(
        self, top: dict[str, Entry], root: Entry, gate: RouterStart
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The model and the prompts of each expert."""
        entry = top.get("experts")
        if entry is None or not isinstance(entry.value, list):
            self._wrong(entry or root, "experts", "must be a list of experts")
            return
        for i, item in enumerate(entry.value):
            at = f"experts.{i}"
            if not isinstance(item.value, dict):
                self._wrong(item, at, "must be a mapping with source_model")
                continue
            own = self._known(item.value, _EXPERT, f"{at}.")
            model = self._text(own, "source_model", f"{at}.", item)
            prompts = self._prompts(own, f"{at}.", item, needed=gate == "hidden")
            if model is not None:
                yield model, prompts

    def _prompts(
        self, own: dict[str, Entry], at: str, item: Entry, *, needed: bool
    ) -> tuple[str, ...]:
        entry = own.get("positive_prompts")
        if entry is None:
            if needed:
                self._wrong(item, f"{at}positive_prompts", "hidden needs at least one prompt")
            return ()
        items = entry.value if isinstance(entry.value, list) else [entry]
        texts = [e.value for e in items if isinstance(e.value, str)]
        if len(texts) < len(items) or items == [entry]:
            self._wrong(entry, f"{at}positive_prompts", "must be a list of texts")
            return ()
        if needed and not any(t.strip() for t in texts):
            self._wrong(entry, f"{at}positive_prompts", "hidden needs a prompt that says something")
        return tuple(texts)

    def _text(self, own: dict[str, Entry], name: str, at: str, parent: Entry) -> str | None:
        entry = own.get(name)
        if entry is None or not isinstance(entry.value, str) or not entry.value.strip():
            shown = f" ({_shown(entry.value)})" if entry is not None else ""
            rule = f"must be a folder, or org/name@revision{shown}"
            self._wrong(entry or parent, at + name, rule)
            return None
        return entry.value.strip()

    def _top_k(self, top: dict[str, Entry]) -> int:
        entry = top.get("experts_per_token", Entry(0, 2))
        if isinstance(entry.value, int) and not isinstance(entry.value, bool) and entry.value > 0:
            return entry.value
        rule = f"must be a whole number above 0 ({_shown(entry.value)})"
        self._wrong(entry, "experts_per_token", rule)
        return 1

    def _dtype(self, top: dict[str, Entry]) -> Any:
        entry = top.get("dtype")
        name = str(entry.value).removeprefix("torch.") if entry is not None else None
        if entry is not None and name not in ("float32", "bfloat16", "float16"):
            rule = f"must be float32, bfloat16 or float16 ({_shown(entry.value)})"
            self._wrong(entry, "dtype", rule)
        return name

    def _target(self, top: dict[str, Entry]) -> str | None:
        """The family of that name, with or without the word for a mixture behind it."""
        entry = top.get("architecture")
        if entry is None:
            return None
        word = str(entry.value).strip().lower().replace(" ", "_").replace("-", "_")
        for name in (word, f"{word}_moe"):
            form = all_architectures().get(name)
            if form is not None and form.is_moe:
                return name
        rule = f"{_shown(entry.value)} is no family here: leave it out, or say it with --target"
        self._wrong(entry, "architecture", rule)
        return None

    def _wrong(self, entry: Entry, at: str, rule: str) -> None:
        line = f":{entry.line}" if entry.line else ""
        self.problems.append(f"{self._where}{line}  {at}: {rule}")


def names_of_models(models: list[str]) -> list[str]:
    """A name for each: the last part of its own, or of its adapter's, and a number where it is
    taken.

    >>> names_of_models(["org/Math-7B@main", "here/Math-7B", "base"])
    ['Math-7B', 'Math-7B-2', 'base-2']
    """
    names: list[str] = []
    for model in models:
        last = re.split(r"[/\\]", model.split("+")[-1].rstrip("/\\"))[-1].partition("@")[0]
        word = re.sub(r"[^\w .-]", "-", last).strip() or "expert"
        word = f"expert-{word}" if word.isdecimal() else word
        number, name = 1, word
        while name in ("base", *names):
            number += 1
            name = f"{word}-{number}"
        names.append(name)
    return names


def _shown(value: Any) -> str:
    plain = value if isinstance(value, str | int | float | bool) else type(value).__name__
    return repr(plain)
