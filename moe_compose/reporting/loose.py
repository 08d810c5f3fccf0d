"""Reading JSON that anybody may have written: what is not there, or is something else, is empty."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any


def at(value: Any, *names: str) -> Any:
    """The entry under these names, one inside the other; None where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def entries(value: Any, *names: str) -> Mapping[str, Any]:
    """An object."""
    found = at(value, *names)
    return found if isinstance(found, Mapping) else {}


def items(value: Any, *names: str) -> list[Any]:
    """A list."""
    found = at(value, *names)
    return list(found) if isinstance(found, list | tuple) else []


def number(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """A number of something, not negative."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def said(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {said(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value))
    return "–" if value is None else str(value)


def short(value: Any, most: int = 160) -> str:
    """A value in few words, cut."""
    text = said(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def by_layer(value: Any) -> Iterator[tuple[int, Any]]:
    """The entries of an object whose keys are layers, in their order."""
    found = entries(value)
    for name in sorted((n for n in found if n.isdecimal()), key=int):
        yield int(name), found[name]


def pretty(value: Any, most: int = 100_000) -> str:
    """A document as text, cut."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}\n… {len(text) - most} more characters"
