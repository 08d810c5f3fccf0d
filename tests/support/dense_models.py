"""Tiny dense models with weights that look trained: every part of a block matters, norms are not 1,
biases not 0, and no entry of the config is what another family would assume.

`dense_checkpoint("llama", folder)` saves one. `SILENT` has the opposite: all entries but the sizes
as the family's class assumes, so that its `config.json` need not say them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 2}
ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
USUAL: dict[str, Any] = {
    **HEADS,
    **ROPE,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 1.3,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
}
DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

#: `model_type` → entries beside `SIZES`; None removes one of `USUAL`.
STATED: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 12, "sliding_window": 9},
    "phi3": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "olmo2": {},
    "granite": MULTIPLIERS,
    "granitemoehybrid": {
        **MULTIPLIERS,
        **MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 56,
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "rope",
    },
    "seed_oss": {"head_dim": 12, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "youtu": {**LATENT, "tie_word_embeddings": False},
    "ernie4_5": {"head_dim": 12, "tie_word_embeddings": False},
    "hunyuan_v1_dense": {"head_dim": 12},
    "cohere2": {
        "rms_norm_eps": None,
        "layer_norm_eps": 1e-3,
        "sliding_window": 9,
        "logit_scale": 0.25,
        "layer_types": WINDOWS,
    },
    "lfm2": {
        "rms_norm_eps": None,
        "norm_eps": 1e-3,
        "block_multiple_of": 16,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "qwen3_5_text": {
        **DELTA,
        "head_dim": 16,
        "rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5},
    },
    "gemma4_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 50000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        "head_dim": 8,
        "global_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 4,
        "final_logit_softcapping": 30.0,
    },
}

#: `model_type` → the sizes beside `SIZES` that differ from the class's own, and nothing else.
SILENT: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in STATED},
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "seed_oss", "qwen3_5_text", "lfm2"), HEADS),
    "youtu": {"num_key_value_heads": 4},
    "phi3": {"pad_token_id": 0},
    "olmo2": {"pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "gemma4_text": {"num_key_value_heads": 2, "vocab_size_per_layer_input": 96},
}


#: (dense, target) → what a source states so that this target is the one with a home for it.
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("phi3", "glm4_moe"): {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50000.0,
            "partial_rotary_factor": 0.5,
        },
        "sliding_window": None,
    },
    ("qwen3", "mellum"): {
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


def dense_config(model_type: str, silent: bool = False, **changes: Any) -> PreTrainedConfig:
    """A small config of the family; `changes` are entries of their own."""
    entries = SILENT[model_type] if silent else {**USUAL, **STATED[model_type]}
    entries = {**SIZES, **entries, **changes}
    return AutoConfig.for_model(model_type, **{k: v for k, v in entries.items() if v is not None})


@torch.no_grad()
def look_trained(model: PreTrainedModel, seed: int = 0) -> None:
    """Redraw the weights so that attention, FFN, norms and biases all carry weight."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        drawn = torch.randn(p.shape, generator=generator)
        if "norm" in name and p.ndim == 1:
            p.add_(0.3 * drawn)
        elif name.endswith("bias") and "dt_" not in name:
            p.copy_(0.3 * drawn)
        elif "embed" in name:
            p.copy_(drawn)
        elif p.ndim == 2:
            gain = 3.0 if "lm_head" in name else 1.5
            p.copy_(gain * drawn / p.shape[1] ** 0.5)


def dense_model(model_type: str, silent: bool = False, **changes: Any) -> PreTrainedModel:
    """The family's causal language model, fp32, in evaluation mode."""
    config = dense_config(model_type, silent, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    look_trained(model)
    return model.eval()


def dense_checkpoint(
    model_type: str, folder: Path, silent: bool = False, **changes: Any
) -> PreTrainedModel:
    """Build the model, save it in `folder`, and return it."""
    model = dense_model(model_type, silent, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def in_old_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as transformers 4 wrote it: rope beside the rest, `torch_dtype`."""
    old = dict(config)
    old["torch_dtype"] = old.pop("dtype")
    rope = dict(old.pop("rope_parameters", None) or {})
    beside = {k: rope.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    scaled = rope.get("rope_type", "default") != "default"
    return old | beside | {"rope_scaling": rope if scaled else None}


def without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` less what its class assumes, or computes from the sizes, anyway."""
    sizes = {name: config[name] for name in (*SIZES, *MAMBA) if name in config}
    assumed = AutoConfig.for_model(config["model_type"], **sizes).to_dict()
    kept = {*sizes, "model_type", "architectures", "dtype"}
    return {k: v for k, v in config.items() if k in kept or k not in assumed or assumed[k] != v}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Replace the folder's `config.json`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
