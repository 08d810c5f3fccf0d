"""Which part of the model a tensor belongs to, and how many parameters each part has, from names
and shapes alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from moe_compose.architectures.family import Architecture, MoE
from moe_compose.checkpoint.source import TensorInfo

Kind = Literal[
    "embedding",
    "head",
    "attention",
    "norm",
    "dense FFN",
    "router",
    "experts",
    "shared experts",
    "MTP",
    "other",
]

#: What may follow a weight's stem: `.weight`, `.bias`, a quantised tensor's companions.
TAIL = r"(?:\.[A-Za-z0-9_]+|_blocks|_scales?|_bias|_scale_inv)*$"
_MIXER = re.compile(r"attn|attention|mixer|mamba|conv|linear_att|rotary|ssm", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs: part, decoder layer, and expert where its name says one."""

    kind: Kind
    layer: int | None = None
    expert: int | None = None


class Locator:
    """Finds each tensor's place by the templates of a family's form.

    Args:
        architecture: the form.
        layers: number of decoder layers, to tell multi-token-prediction layers from the others.
    """

    def __init__(self, architecture: Architecture, layers: int) -> None:
        a = architecture
        self._layers = layers
        self._mtp = [re.compile(re.escape(p).replace(r"\{n\}", r"(?P<n>\d+)")) for p in a.mtp]
        rules: list[tuple[Kind, str]] = [("embedding", a.embedding), ("head", a.head)]
        rules += [(cast(Kind, part), name) for name, part in a.parts.items()]
        rules += [("router", t.name) for t in a.router]
        if a.shared:
            gate = [a.shared.gate] if a.shared.gate else []
            rules += [("shared experts", n) for n in (*a.shared.matrices.names, *gate)]
        if a.experts:
            rules += [("experts", n) for n in (*a.experts.names, *a.experts.biases)]
        if a.mlp:
            rules += [("dense FFN", n) for n in a.mlp.names]
        self._rules = [(kind, _pattern(name)) for kind, name in rules]

    def place(self, name: str) -> Place:
        """The part that `name` belongs to; `other` when nothing says."""
        for prefix in self._mtp:
            m = prefix.match(name)
            if m and int(m.groupdict().get("n", self._layers)) >= self._layers:
                return Place("MTP")
        for kind, pattern in self._rules:
            if m := pattern.match(name):
                found = {k: int(v) for k, v in m.groupdict().items()}
                return Place(kind, found.get("i"), found.get("e"))
        layer = re.search(r"\.(\d+)\.", name)
        at = int(layer[1]) if layer else None
        words = name.split(".")
        if len(words) > 1 and "norm" in words[-2]:  # `model.norm.weight`: the module's name
            return Place("norm", at)
        return Place("attention" if _MIXER.search(name) else "other", at)

    def named(self, names: Iterable[str]) -> int:
        """How many of `names` a template of the form names, rather than a guess by words."""
        return sum(any(pattern.match(n) for _, pattern in self._rules) for n in names)


def layout_of(architecture: Architecture, names: Collection[str]) -> Architecture:
    """The form itself, or the one of its `layouts` that names more of a checkpoint's tensors."""
    if not architecture.layouts:
        return architecture
    forms = (architecture, *architecture.layouts)
    return max(forms, key=lambda form: Locator(form, 0).named(names))


def _pattern(template: str) -> re.Pattern[str]:
    stem = re.escape(template.removesuffix(".weight"))
    stem = stem.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(stem + TAIL)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameter counts. Elements of the tensors on disk; a tied head is counted once, as it is
    stored.

    Attributes:
        total: all of them, multi-token-prediction layers excluded (as published counts do).
        active: those one token passes through: `total − routed·(E − k)/E`, embedding table included
            whole, which is how Mixtral's 12.9B and Qwen3's "A3B" are counted.
        active_without_embedding: the same less the embedding table (gpt-oss's convention).
        by_part: part → count.
        mtp: multi-token-prediction parameters, outside `total`.
    """

    total: int
    active: int
    active_without_embedding: int
    by_part: Mapping[str, int]
    mtp: int


def count_parameters(
    architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Parameters:
    """Count parameters by part.

    Args:
        architecture: the family's form.
        config: `config.json`.
        tensors: names and shapes.
    """
    form = layout_of(architecture, tensors)
    locator = Locator(form, form.layers.integer(config))
    parts: Counter[str] = Counter()
    for t in tensors.values():
        parts[locator.place(t.name).kind] += t.numel
    mtp = parts.pop("MTP", 0)
    total = sum(parts.values())
    idle = 0
    if architecture.is_moe and parts["experts"]:
        moe: MoE = architecture.moe(config)
        idle = parts["experts"] * (moe.num_experts - moe.top_k) // moe.num_experts
    tied = not parts["head"]
    table = 0 if tied else parts["embedding"]
    return Parameters(total, total - idle, total - idle - table, dict(parts), mtp)
