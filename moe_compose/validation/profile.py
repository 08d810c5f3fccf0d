"""The portable profile: what other engines need of a checkpoint, and who breaks, silently or not,
when it is missing.

General rules stand here; what concerns one family is data on its form (`Architecture.portable`).
Every rule names, by its own name, each engine that it breaks. transformers 5 is the reference. The
rules come from vLLM 0.32, llama.cpp, mlx-lm 0.32, transformers 4.57 and SGLang; tests run the first
four on results of surgery (SGLang has no build for a CPU).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_compose.architectures import Architecture, find
from moe_compose.checkpoint.source import TensorSource
from moe_compose.validation.report import Check


def check_profile(checkpoint: TensorSource) -> list[Check]:
    """One check per rule that is broken, or a single pass.

    Args:
        checkpoint: a local folder, or a plan.
    """
    if broken := broken_rules(checkpoint):
        return [Check("portability", "warn", text) for text in broken]
    return [Check("portability", "pass", "meets the portable profile")]


def broken_rules(checkpoint: TensorSource) -> list[str]:
    """A sentence for every rule that a local folder, or a plan, breaks."""
    config, form = checkpoint.config, find(checkpoint.config)
    broken = [*_dialects(config, form), *_tokenizer(checkpoint)]
    if form is not None:
        broken += _family(config, form)
    if form is not None and form.is_moe:
        broken += _shapes(config, form)
    return broken


def _dialects(config: Mapping[str, Any], form: Architecture | None) -> Iterator[str]:
    if not config.get("architectures"):
        yield "config.json has no architectures: vLLM, SGLang and llama.cpp refuse it"
    old = config.get("rope_theta") is not None or config.get("rope_scaling") is not None
    per_layer = form is not None and form.per_layer_rope
    if config.get("rope_parameters") and not old and not per_layer:
        yield (
            "rope_theta stands only inside rope_parameters: transformers 4 silently takes its "
            "default, and so does mlx-lm where it does not refuse the config"
        )
    rope = config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    if None not in (theta, config.get("rope_theta")) and theta != config["rope_theta"]:
        yield (
            f"rope_theta is {config['rope_theta']:g} beside {theta:g} in rope_parameters: "
            "transformers 4 and mlx-lm silently take the first, transformers 5 the second"
        )
    if not config.get("torch_dtype") and config.get("dtype"):
        yield "torch_dtype is missing beside dtype: transformers 4 loads in float32"
    if form is not None and form.is_moe:
        missing = [k for k in (form.num_experts.name, *form.num_experts.aliases) if k not in config]
        if missing and "." not in form.num_experts.name:
            yield f"{', '.join(missing)} is missing: transformers 4, llama.cpp and mlx-lm need it"


def _tokenizer(checkpoint: TensorSource) -> Iterator[str]:
    path = checkpoint.files.get("tokenizer_config.json")
    if path is None:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        yield "tokenizer_config.json is not readable JSON: every engine refuses it"
        return
    if found == "TokenizersBackend":
        yield (
            "tokenizer_class is TokenizersBackend: transformers 4 and llama.cpp's converter cannot "
            "read it (PreTrainedTokenizerFast is the portable name)"
        )


def _family(config: Mapping[str, Any], form: Architecture) -> Iterator[str]:
    for rule in form.portable:
        value = rule.key.get(config)
        if value not in rule.allowed:
            yield f"{rule.key.name} is {json.dumps(value)}: {rule.breaks}"
    if form.sparse_only and form.is_moe and not all(form.moe(config).sparse):
        yield f"some layers are dense: {form.sparse_only}"


def needs_eager_experts(config: Mapping[str, Any]) -> bool:
    """Whether transformers' default experts refuse the stated dtype: rows must fill 16 bytes."""
    form = find(config)
    if form is None or not form.is_moe:
        return False
    size = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    return form.moe(config).expert_width * size % 16 != 0


def _shapes(config: Mapping[str, Any], form: Architecture) -> Iterator[str]:
    moe = form.moe(config)
    if needs_eager_experts(config):
        yield (
            f"expert width {moe.expert_width} does not fill 16 bytes in this dtype: transformers "
            'runs it only with experts_implementation="eager", and vLLM\'s kernels refuse it'
        )
    elif moe.expert_width % 8:
        yield (
            f"expert width {moe.expert_width} is no multiple of 8: transformers' grouped_mm and "
            "vLLM's kernels refuse it in bf16"
        )
    elif moe.expert_width % 32:
        yield f"expert width {moe.expert_width} is no multiple of 32: llama.cpp's q8_0 refuses it"
    if moe.hidden % 32:
        yield f"hidden size {moe.hidden} is no multiple of 32: llama.cpp leaves tensors unquantised"
    groups = moe.routing.groups
    if groups > 1 and (moe.num_experts % groups or moe.num_experts // groups < 2):
        yield (
            f"{moe.num_experts} experts in {groups} groups: vLLM silently routes ungrouped, "
            "llama.cpp aborts"
        )
