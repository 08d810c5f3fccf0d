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

#: safetensors dtype → the name configs use.
CONFIG_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


def state_facts(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """`config` with everything written out that its family's class would assume.

    Needed when a checkpoint changes family: the new class assumes other things.
    """
    stated = dict(config)
    for name, default in architecture.facts.items():
        if name == "rope_theta" and "rope_theta" in (stated.get("rope_parameters") or {}):
            continue
        if name not in stated:
            stated[name] = default.get(config) if isinstance(default, Key) else default
    return stated


def _flat_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` when it is one set for all layers; None when absent or kept per layer type.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        return None
    return dict(rope)


def both_dialects(config: dict[str, Any], architecture: Architecture) -> None:
    """Write rope parameters and dtype under their old and their new names, in place.

    Rope parameters that are kept per layer type have one dialect only and stay as they are.
    """
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = dtype
    if architecture.per_layer_rope:
        return
    rope = _flat_rope(config)
    if rope is not None:
        _old_from_new(config, rope)
    elif "rope_parameters" not in config or config["rope_parameters"] is None:
        _new_from_old(config)


def _old_from_new(config: dict[str, Any], rope: dict[str, Any]) -> None:
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        rope["rope_theta"] = config["rope_theta"] = theta
    rope.setdefault("rope_type", "default")
    partial = rope.get("partial_rotary_factor")
    if partial is not None:
        config["partial_rotary_factor"] = partial
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config["rope_parameters"] = rope


def _new_from_old(config: dict[str, Any]) -> None:
    if config.get("rope_theta") is None and config.get("rope_scaling") is None:
        return
    scaling = dict(config.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    rope: dict[str, Any] = {}
    if config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    if config.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    config["rope_parameters"] = rope | scaling
