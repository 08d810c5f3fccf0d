"""`--train` in words: `router`, `router+experts=3,5`, `lora-attention`, `all`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_compose.errors import OptionError


@dataclass(frozen=True, slots=True)
class Parts:
    """What trains.

    Attributes:
        everything: all parameters; the rest says nothing then.
        experts: ids of the experts that train beside all routers.
        lora: what gets adapters beside all routers: attention, experts, all (both), or nothing.
    """

    everything: bool = False
    experts: tuple[int, ...] = ()
    lora: str = ""

    @classmethod
    def parse(cls, text: str) -> Parts:
        """What `--train` says.

        Raises:
            OptionError: it says something else.

        Example:
            >>> Parts.parse("router+experts=5,3").experts
            (3, 5)
        """
        if text == "all":
            return cls(everything=True)
        if match := re.fullmatch(r"lora-(attention|experts|all)", text):
            return cls(lora=match[1])
        match = re.fullmatch(r"router(?:\+experts=(\d+(?:,\d+)*))?", text)
        if match is None:
            raise OptionError(
                f"train ({text}) must be router, router+experts=3,5, lora-attention, lora-experts, "
                "lora-all or all"
            )
        return cls(experts=tuple(sorted({int(e) for e in (match[1] or "").split(",") if e})))
