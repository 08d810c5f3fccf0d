"""A checkpoint's surgery history in short: a `Step` for each record of `moe_compose.json`, which
anybody may have written, so nothing in it is taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from typing import Any

#: Operation → where its options are, of those that have any.
OPTIONS = {
    "upcycle": "surgery.upcycle_options.UpcycleOptions",
    "compose": "surgery.compose_options.ComposeOptions",
    "anchor": "surgery.expert_options.AnchorOptions",
    "add-expert": "surgery.expert_options.AddOptions",
    "swap-expert": "surgery.expert_options.SwapOptions",
    "remove-expert": "surgery.expert_options.RemoveOptions",
    "expand": "surgery.expert_options.ExpandOptions",
    "extract": "surgery.extract_options.ExtractOptions",
    "route": "composition.options.RoutingOptions",
    "prune": "surgery.prune_options.PruneOptions",
    "merge": "surgery.merge_options.MergeOptions",
    "train-router": "training.options.TrainOptions",
}


@dataclass(frozen=True, slots=True)
class Step:
    """An operation that a checkpoint went through.

    Attributes:
        operation: the verb.
        sources: labels of what it was done to.
        options: those that differ from their default, or all of an operation that is not known.
        preservation: `exact`, `approximate`, `none`, or `?`.
        why: the reason, as the plan stated it.
        total, active: parameters of its result; None where the record is silent.
        digest: of the plan.
        version: of moe-compose that did it.
    """

    operation: str
    sources: tuple[str, ...]
    options: Mapping[str, str]
    preservation: str
    why: str
    total: int | None
    active: int | None
    digest: str
    version: str


def steps_of(history: Iterable[Mapping[str, Any]]) -> Iterator[Step]:
    """The steps of a history, oldest first."""
    for record in history:
        operation = str(record.get("operation"))
        stated, counted = _object(record, "preservation"), _object(record, "parameters")
        sources = _list(record.get("sources"))
        labels = [s.get("label") for s in sources if isinstance(s, Mapping)]
        usual = _defaults(operation)
        options = _object(record, "options").items()
        yield Step(
            operation=operation,
            sources=tuple(map(str, labels)),
            options={str(n): _text(v) for n, v in options if not _usual(usual, n, v)},
            preservation=str(stated.get("kind", "?")),
            why=str(stated.get("why", "")),
            total=_number(counted.get("total")),
            active=_number(counted.get("active")),
            digest=str(record.get("plan_digest", "?")),
            version=str(record.get("version", "?")),
        )


@cache
def _defaults(operation: str) -> Mapping[str, Any]:
    """Option → its default, as JSON holds it; a sentinel for one that must be given."""
    if operation not in OPTIONS:
        return {}
    module, _, name = OPTIONS[operation].rpartition(".")
    found = fields(getattr(import_module(f"moe_compose.{module}"), name))
    return {f.name: _list(f.default) or f.default for f in found}


def _usual(usual: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether an option says nothing: it is at its default, or absent."""
    value = _list(value) or value
    return value is None or value in ([], (), "") or (name in usual and usual[name] == value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _object(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
