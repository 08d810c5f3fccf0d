"""From plain values, as YAML and JSON have them, to the fields of an options dataclass."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Numbers that YAML 1.1 takes for texts.
_POWER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """Field → its type."""
    return get_type_hints(cls)


def attribute_docs(cls: type) -> dict[str, str]:
    """Name → text of every entry of a class docstring's `Attributes:` section.

    An entry may name several (`a, b: ...`) and go on over indented lines.
    """
    _, _, section = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2].strip()))
        elif line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def required(field: Field[Any]) -> bool:
    """Whether it must be given."""
    return field.default is MISSING and field.default_factory is MISSING


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, None left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(t for t in get_args(hint) if t is not types.NoneType)
    return (hint,)


def converted(value: Any, hint: Any) -> Any:
    """A plain value as a field's type.

    Raises:
        ValueError: it is none; what it must be, in words.
    """
    if value is None and types.NoneType in get_args(hint):
        return None
    kinds = kinds_of(hint)
    for kind in kinds:
        try:
            return _as(value, kind)
        except ValueError:
            continue
    raise ValueError(" or ".join(map(described, kinds)))


def _as(value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind) and type(value) in {type(a) for a in get_args(kind)}:
            return value
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_as(item, get_args(kind)[0]) for item in items)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and _POWER.fullmatch(value):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind in (str, Path) and (type(value) in (str, int, float) or isinstance(value, Path)):
        return kind(value)
    raise ValueError(described(kind))


def described(kind: Any) -> str:
    """What a type is called in a message."""
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is tuple:
        return f"a list, each {described(get_args(kind)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return words.get(kind, "a text")
