"""Names of experts: an extra entry of `config.json`, in the order of the experts, null where one
has none. It says which expert is whose, so that one can be added, upgraded or taken out by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_compose.errors import OptionError

ENTRY = "expert_names"


def names_of(config: Mapping[str, Any], count: int) -> tuple[str | None, ...]:
    """The name of each of `count` experts; None for those without.

    >>> names_of({"expert_names": ["base", None]}, 2)
    ('base', None)
    """
    found = config.get(ENTRY)
    if not isinstance(found, list) or len(found) != count:
        return (None,) * count
    return tuple(n if isinstance(n, str) and n else None for n in found)


def set_names(config: dict[str, Any], names: Sequence[str | None]) -> None:
    """Write the entry in place; none is left where no expert has a name."""
    config.pop(ENTRY, None)
    if any(names):
        config[ENTRY] = list(names)


def index_of(config: Mapping[str, Any], count: int, wanted: str | int) -> int:
    """The expert that a name or an index means.

    Raises:
        OptionError: there is none.
    """
    names = names_of(config, count)
    if wanted in names:
        return names.index(str(wanted))
    text = str(wanted)
    if text.isdecimal() and int(text) < count:
        return int(text)
    known = ", ".join(n for n in names if n)
    raise OptionError(
        f"there is no expert {text!r}: experts are 0 to {count - 1}"
        + (f", by name {known}" if known else ", and none has a name")
    )


def name_problem(name: str, taken: Sequence[str | None]) -> str | None:
    """Why an expert cannot be called so; None if it can."""
    if not name or name.isdecimal() or not name.isprintable() or any(c in name for c in "#=+:/\\"):
        return f"name ({name!r}) must be a word that is no number, without any of # = + : / \\"
    if name in taken:
        return f"name ({name!r}) is taken by expert {list(taken).index(name)}"
    return None
