"""What can be asked of the operations on single experts. Read by the command line's help, so it
imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What becomes of multi-token-prediction layers, whose experts are counted by the same entry.
MtpPolicy = Literal["prune", "keep", "drop"]

#: How the new router row starts.
AddRouter = Literal["copy", "trained", "ridge", "hidden", "off"]
ADD_ROUTERS: tuple[AddRouter, ...] = ("copy", "trained", "ridge", "hidden", "off")

#: What becomes of the router row.
SwapRouter = Literal["keep", "trained", "ridge", "hidden"]
SWAP_ROUTERS: tuple[SwapRouter, ...] = ("keep", "trained", "ridge", "hidden")


@dataclass(frozen=True, kw_only=True, slots=True)
class AddOptions:
    """Options of `add_expert`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        name: What the new expert is called, so that it can be swapped or removed by name.
        router: How its router row starts: copy (of --like), trained (the row that comes with it),
            ridge or hidden (from text, or from packed statistics), or off (a row that is never
            chosen, from text); by default ridge with text or statistics, copy without.
        like: The expert, by name or number, whose row is copied; by default the one that the new
            expert is a copy of, or 0.
        rows: Which rows follow from the statistics: new, or all of them, solved again together.
        top_k: Experts that each token passes through from now on; by default as before.
        mtp: Experts of multi-token-prediction layers, which the config counts too: prune keeps
            their own and repeats the one that --like names, drop leaves these layers out.
    """

    name: str | None = None
    router: AddRouter | None = None
    like: str | None = None
    rows: Literal["new", "all"] = "new"
    top_k: int | None = None
    mtp: MtpPolicy = "prune"


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapOptions:
    """Options of `swap_expert`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        expert: The expert that goes, by name or number.
        name: What the new one is called; by default as the old one.
        router: Its router row: keep (the old expert's), trained (the row that comes with it), ridge
            or hidden (from text, or from packed statistics).
    """

    expert: str
    name: str | None = None
    router: SwapRouter = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoveOptions:
    """Options of `remove_expert`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        expert: An expert to remove from every layer, by name or number; again for more.
        top_k: Experts that each token passes through from now on; by default as before.
        mtp: Experts of multi-token-prediction layers: prune removes them too, drop leaves these
            layers out.
    """

    expert: tuple[str, ...]
    top_k: int | None = None
    mtp: MtpPolicy = "prune"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpandOptions:
    """Options of `expand`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        factor: How often every expert is there.
        top_k: Experts that each token passes through: scale by the factor, which computes the
            same, or keep, which does not.
        mtp: Experts of multi-token-prediction layers: prune repeats them too, drop leaves these
            layers out.
    """

    factor: int = 2
    top_k: Literal["scale", "keep"] = "scale"
    mtp: MtpPolicy = "prune"


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorOptions:
    """Options of `anchor`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        name: What the trainable expert is called.
        target: MoE family of the result, such as flex_olmo; by default the most portable exact one.
        seed: Seed of the router's rows.
    """

    name: str = "expert"
    target: str | None = None
    seed: int = 0
