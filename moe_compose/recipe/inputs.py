"""What a step reads beside its options, in the words of the command line.

source: models/moe                     a folder, or org/name@revision
expert: {math: models/math}            or ["math=models/math"]
data: {en: en.txt, py: [a.txt, b.txt]} or ["en=en.txt", ...], or a file, or a list of files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_compose.recipe.values import converted

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain

Kind = Literal["model", "models", "texts", "folder", "text", "whole", "number", "flag"]

_PLAIN: Mapping[str, Any] = {
    "text": str,
    "whole": int,
    "number": float,
    "flag": bool,
    "folder": Path,
}


@dataclass(frozen=True, slots=True)
class Input:
    """Something that a step reads.

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
            return converted(value, _PLAIN[self.kind])
        if self.kind == "model":
            if not isinstance(value, str) or not value:
                raise ValueError("a folder, or a name on the Hub")
            return value
        return _words(value, named=self.kind == "models")


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
    if named and not all("=" in i for i in items):
        raise ValueError(what)
    return tuple(items)


def by_name(words: tuple[str, ...], unnamed: str | None = None) -> dict[str, tuple[Domain, ...]]:
    """Words `[NAME=]FILE` as texts, each name with its own; see `read_texts`."""
    from moe_compose.calibration.data import read_texts

    return {d.name: (d,) for d in read_texts(*words, unnamed=unnamed)} if words else {}
