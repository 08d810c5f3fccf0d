"""What can be asked of `extract`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions:
    """Options of `extract`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        expert: The expert to take out, by number or name.
        target: Dense family of the result; by default the one that the mixture was grown from, or
            the first whose config says all that the mixture's does.
    """

    expert: str = "0"
    target: str | None = None
