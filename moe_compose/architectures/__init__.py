"""The families that moe-compose knows, each as one declarative record.

`find(config)` gives a checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from moe_compose.architectures.family import Architecture, MoE
from moe_compose.architectures.twin import Twin

__all__ = ["Architecture", "MoE", "Twin", "all_architectures", "find", "targets_of"]

#: Modules that hold families; every `Architecture` in them is one.
_MODULES = (
    *("mixtral", "qwen", "olmo", "granite"),
    *("deepseek", "glm", "dots", "solar", "axk1", "mimo", "exaone", "beam", "kimi", "ernie"),
    *("hunyuan", "minimax", "phi", "qwen_next", "mellum", "flint", "kolibri", "laguna", "afmoe"),
    *("lfm", "jamba", "gpt_oss", "llama4", "dbrx", "jetmoe", "aria", "cohere", "nemotron"),
    *("gemma4", "zaya", "longcat"),
)


@cache
def all_architectures() -> Mapping[str, Architecture]:
    """`model_type` → form, for every family, in the order of the modules."""
    found: dict[str, Architecture] = {}
    for name in _MODULES:
        module = import_module(f"moe_compose.architectures.{name}")
        public = (v for name, v in vars(module).items() if not name.startswith("_"))
        for form in {id(v): v for v in public if isinstance(v, Architecture)}.values():
            if found.setdefault(form.model_type, form) is not form:
                raise AssertionError(f"two forms for {form.model_type}")
    return found


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The form of the family that `config` names; None for a family without one."""
    return all_architectures().get(str(config.get("model_type")))


def targets_of(dense: str) -> tuple[Architecture, ...]:
    """MoE families that a dense family can be grown into, the most portable first."""
    return tuple(a for a in all_architectures().values() if a.twin_of(dense))
