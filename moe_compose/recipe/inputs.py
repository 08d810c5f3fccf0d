"""What a step reads and writes beside its options, in the words of the command line.

source: models/moe                     a folder, org/name@revision, or steps.0
expert: {math: models/math}            or ["math=models/math"]
data: {en: en.txt, py: [a.txt, b.txt]} or ["en=en.txt", ...], or a file, or a list of files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_compose.errors import OptionError
from moe_compose.recipe.values import converted
from moe_compose.reporting.units import parse_bytes

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain

#: What an input is. Of `out` and `save` something is written, all other files are read.
Kind = Literal[
    "model", "donor", "donors", "texts", "stats", "file", "out", "save",
    "text", "whole", "number", "flag", "bytes",
]  # fmt: skip

_PLAIN: Mapping[str, Any] = {
    "text": str,
    "whole": int,
    "number": float,
    "flag": bool,
    "stats": Path,
    "file": Path,
    "out": Path,
    "save": Path,
}


@dataclass(frozen=True, slots=True)
class Input:
    """Something that a step reads or writes.

    Attributes:
        kind: what it is.
        help: one line.
        required: whether it must be given.
    """

    kind: Kind
    help: str
    required: bool = False

    def read(self, value: Any) -> Any:
        """A plain value as what it is: a text, words `NAME=FILE`, a number.

        Raises:
            ValueError: it is none; what it must be, in words.
        """
        if self.kind in _PLAIN:
            found = converted(value, _PLAIN[self.kind])
            return found.expanduser() if isinstance(found, Path) else found
        if self.kind == "bytes":
            return parse_bytes(value)
        if self.kind in ("model", "donor"):
            if not isinstance(value, str) or not value:
                raise ValueError("a folder, a name on the Hub, or steps.N")
            return value
        return _words(value, named=self.kind == "donors")


def _words(value: Any, *, named: bool) -> tuple[str, ...]:
    """Mappings and lists as the words of a command line."""
    what = "NAME: MODEL" if named else "NAME: FILE, or a file, or a list of them"
    if isinstance(value, Mapping):
        found = []
        for name, files in value.items():
            for file in files if isinstance(files, list | tuple) else [files]:
                if not isinstance(file, str):
                    raise ValueError(what)
                found.append(f"{name}={file}")
        return tuple(found)
    items = value if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(i, str) and i for i in items):
        raise ValueError(what)
    return tuple(items)


def read_given(known: Mapping[str, Input], values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as inputs; those that say nothing are left out.

    Args:
        known: name → input.
        values: name → plain value, as flags have them.

    Raises:
        OptionError: values that mean nothing, all of them.
    """
    found, problems = {}, []
    for name, value in values.items():
        if value is None or value is False or value in ([], ()):
            continue
        try:
            found[name] = known[name].read(value)
        except ValueError as e:
            said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            problems.append(f"{name} ({said}) must be {e}")
    if problems:
        raise OptionError("these options cannot be meant", problems=problems)
    return found


def by_name(words: tuple[str, ...], unnamed: str | None = None) -> dict[str, tuple[Domain, ...]]:
    """Words `[NAME=]FILE` as texts, each name with its own; see `read_texts`.

    Raises:
        OptionError: a file without a name where there is nobody that it can be about, or unreadable
            text.
    """
    from moe_compose.calibration.data import read_texts

    lone = [w for w in words if "=" not in w]
    if lone and unnamed is None:
        raise OptionError(f"data {lone[0]}: say whose text it is (NAME={lone[0]})")
    return {d.name: (d,) for d in read_texts(*words, unnamed=unnamed)} if words else {}
