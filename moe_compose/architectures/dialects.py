"""`config.json` in both dialects.

transformers 5 writes `rope_parameters` and `dtype`; everything older, and other engines'
converters, read `rope_theta`, `rope_scaling` and `torch_dtype`, and take a default without a word
when they are absent. A config that states both computes the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures.base import Key
from moe_compose.architectures.family import Architecture
from moe_compose.errors import CheckpointError

#: Entries of `rope_parameters` that the old dialect keeps beside `rope_scaling`.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def state_facts(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """`config` with everything written out that its family's class would assume.

    Needed when a checkpoint changes family: the new class assumes other things. A fact that follows
    from other entries also replaces a null, which classes take to mean the same.

    Raises:
        CheckpointError: rope parameters that are no object.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), Mapping | None):
            raise CheckpointError(f"config.json: {name} must be an object ({config[name]!r})")
    stated = dict(config)
    for name, default in architecture.facts.items():
        if name in _BESIDE_SCALING and name in _scaling(config):
            continue
        if isinstance(default, Key):
            if stated.get(name) is None:
                stated[name] = default.get(config)
        elif name not in stated:
            stated[name] = default
    return stated


def rope_per_layer_type(config: Mapping[str, Any]) -> bool:
    """Whether each layer type has rope parameters of its own."""
    return any(isinstance(v, Mapping) for v in _scaling(config).values())


def both_dialects(config: dict[str, Any], architecture: Architecture) -> None:
    """Write rope parameters and dtype under their old and their new names, in place.

    Rope parameters that are kept per layer type have one dialect only and stay as they are.
    """
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = dtype
    if architecture.per_layer_rope or rope_per_layer_type(config):
        return
    rope = _rope(config)
    if rope is None:
        return
    config["rope_parameters"] = rope
    config.update({name: rope[name] for name in _BESIDE_SCALING if name in rope})
    scaling = {k: v for k, v in rope.items() if k not in _BESIDE_SCALING}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping that transformers reads: `rope_scaling` goes before `rope_parameters`."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    return found if isinstance(found, Mapping) else {}


def _rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """One set of rope parameters in the new dialect; None when the config names none."""
    rope = dict(_scaling(config))
    for name in _BESIDE_SCALING:
        if rope.get(name) is None and config.get(name) is not None:
            rope[name] = config[name]
    if not rope:
        return None
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope
