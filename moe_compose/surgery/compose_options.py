"""What can be asked of `compose`: presets, what becomes of the shared parameters, routers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.surgery.expert_names import name_problem

Shared = Literal[
    "base", "mean", "weighted", "slerp", "ties", "dare", "task-arithmetic", "best"
]  # fmt: skip
RouterStart = Literal["ridge", "trained", "hidden", "domain", "random", "zeros"]
Preset = Literal["btx", "bar", "flexolmo"]

#: How non-expert parameters become one set.
SHARED: Mapping[str, tuple[str, str]] = {
    "base": ("the base's, byte for byte", "FlexOlmo, arXiv 2507.07024"),
    "mean": ("the mean over all experts' models", "BTX, arXiv 2403.07816"),
    "weighted": ("the mean under --weight NAME=NUMBER", "BTX, arXiv 2403.07816"),
    "slerp": ("of two models, along the arc between them", "mergekit"),
    "ties": ("differences to the base, trimmed, one sign each", "TIES, arXiv 2306.01708"),
    "dare": ("differences to the base, dropped at random, rescaled", "DARE, arXiv 2311.03099"),
    "task-arithmetic": ("the base plus the sum of differences", "arXiv 2212.04089"),
    "best": ("base or mean, whichever has the lower loss on held-out text", "measured"),
}

#: Where router rows come from.
ROUTERS: Mapping[str, tuple[str, str]] = {
    "ridge": (
        "least squares from each expert's own text; the default with text",
        "DUME, arXiv 2603.29765",
    ),
    "trained": ("the rows that come with anchored pairs", "FlexOlmo, arXiv 2507.07024"),
    "hidden": ("mean of the true router inputs on each expert's text", "as mergekit means to"),
    "domain": ("a document embedding per expert, the same in all layers", "arXiv 2507.07024"),
    "random": ("drawn; to be trained", "BTX, arXiv 2403.07816"),
    "zeros": ("uniform; ties go to the first experts", "baseline"),
}

#: Preset → shared, router with text, router without.
PRESETS: Mapping[str, tuple[Shared, RouterStart, RouterStart]] = {
    "btx": ("mean", "ridge", "random"),
    "bar": ("mean", "trained", "trained"),
    "flexolmo": ("base", "trained", "trained"),
}

#: Routers that need text of each expert.
WITH_TEXT: tuple[str, ...] = ("ridge", "hidden")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposeOptions:
    """Options of `compose`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        top_k: Experts that each token passes through.
        preset: What shared and router are by default, and what is checked: btx (branches,
            averaged), bar (anchored pairs, averaged where they diverged), or flexolmo (anchored,
            shared tensors bit-equal).
        base_expert: The base's own FFN is expert 0.
        shared: Non-expert parameters: base, mean, weighted, slerp, ties, dare, task-arithmetic, or
            best (base or mean, measured); by default the preset's.
        router: How router rows start: ridge, trained, hidden, domain, random, or zeros; by default
            the preset's, with text ridge.
        weight: How much an expert's model counts in the shared parameters, such as math=2; 1 each
            by default.
        density: Share of each difference that ties and dare keep.
        scale: Factor on the sum of differences: ties, dare, task-arithmetic.
        adapter_shared: What becomes of a LoRA adapter's part outside the FFNs: refuse, or average
            it into the shared parameters.
        target: MoE family of the result, such as mixtral; by default the most portable exact one.
        router_std: Standard deviation of random rows; by default 0.02.
        seed: Seed of every random draw.
        dtype: Convert weights to float32, bfloat16 or float16; by default the base's own.
    """

    top_k: int = 2
    preset: Preset = "btx"
    base_expert: bool = True
    shared: Shared | None = None
    router: RouterStart | None = None
    weight: tuple[str, ...] = ()
    density: float = 0.2
    scale: float = 1.0
    adapter_shared: Literal["refuse", "average"] = "refuse"
    target: str | None = None
    router_std: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Name → weight, as `weight` says; entries that say nothing left out."""
        found = {}
        for entry in self.weight:
            name, _, number = entry.rpartition("=")
            value = _number(number)
            if name and value is not None:
                found[name] = value
        return found

    def settled(self, *, text: bool, pairs: bool) -> ComposeOptions:
        """The same with nothing left open.

        Args:
            text: each expert's text is given.
            pairs: all donors are anchored pairs, which bring rows of their own.
        """
        shared, with_text, without = PRESETS.get(self.preset, PRESETS["btx"])
        router = with_text if text else without
        if router == "trained" and not pairs:
            router = "ridge" if text else "random"
        return replace(self, shared=self.shared or shared, router=self.router or router)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def compose_option_problems(options: ComposeOptions, names: Sequence[str]) -> Iterator[str]:
    """Options, or combinations, that cannot be meant.

    Args:
        options: of the composition.
        names: of the given experts, without the base's.
    """
    if not names:
        yield "there are no experts to compose (expert NAME=MODEL, at least once)"
    for i, name in enumerate(names):
        if problem := name_problem(name, ["base", *names[:i]]):
            yield problem
    taken = ["base", *names] if options.base_expert else list(names)
    if not 1 <= options.top_k <= len(taken):
        yield f"top_k ({options.top_k}) must be between 1 and the number of experts ({len(taken)})"
    for field, words in (("preset", PRESETS), ("shared", SHARED), ("router", ROUTERS)):
        value = getattr(options, field)
        if value is not None and value not in words:
            yield f"{field} ({value}) must be one of {', '.join(words)}"
    if options.adapter_shared not in ("refuse", "average"):
        yield f"adapter_shared ({options.adapter_shared}) must be refuse or average"
    if options.dtype is not None and options.dtype not in FLOAT_DTYPES.values():
        yield f"dtype ({options.dtype}) must be float32, bfloat16 or float16"
    yield from _numbers(options)
    yield from _weights(options, taken)


def _numbers(options: ComposeOptions) -> Iterator[str]:
    if not 0 < options.density <= 1:
        yield f"density ({options.density}) must be above 0 and at most 1"
    if not 0 <= options.scale < math.inf:
        yield f"scale ({options.scale}) must be a finite number, 0 or more"
    if options.router_std is not None and not 0 <= options.router_std < math.inf:
        yield f"router_std ({options.router_std}) must be a finite number, 0 or more"


def _weights(options: ComposeOptions, names: Sequence[str]) -> Iterator[str]:
    for entry in options.weight:
        name, _, number = entry.rpartition("=")
        if _number(number) is None:
            yield f"weight ({entry}) must be NAME=NUMBER, the number 0 or more"
        elif name not in names:
            yield f"weight ({entry}): no expert {name!r}; there are {', '.join(names)}"
    if options.weight and options.shared in ("base", "best", "mean"):
        yield f"weight has no meaning for shared = {options.shared}"
    if options.shared == "slerp" and len(names) != 2:
        yield f"shared = slerp takes exactly two models ({len(names)})"
    if options.shared == "weighted" and not any(options.weights.get(n, 1.0) for n in names):
        yield "weight leaves every model at 0"
