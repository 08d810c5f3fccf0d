"""Tiny random models of every family, built from transformers' own config classes.

`tiny_config("qwen3_moe")` is a config with small, mutually different sizes, so that a shape with
two dimensions exchanged shows. `tiny_checkpoint("qwen3_moe", folder)` builds the model with seeded
random weights and saves it under the names that it has on the Hub.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

#: Sizes that nearly every config class knows.
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Multi-head latent attention, as in DeepSeek.
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
#: DeepSeek's experts: in groups, some of them shared, the first layers dense.
DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
QWEN: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
LOCAL: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
#: Gated delta-rule layers, as in Qwen3-Next.
DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
SHARED_WIDTH: dict[str, Any] = {"shared_expert_intermediate_size": 56}
MIXED_MLP: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
HYBRID_ATTENTION: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}

#: `model_type` → what differs from `COMMON`; None removes an entry.
TINY: dict[str, dict[str, Any]] = {
    # dense families
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
    "granite": {},
    # llama's and mistral's lineage
    "mixtral": LOCAL,
    "minimax": {**LOCAL, "head_dim": 8, "layer_types": ["full_attention", "linear_attention"] * 2}
    | {"num_hidden_layers": 4},
    "minimax_m2": {**LOCAL, "head_dim": 8},
    "phimoe": LOCAL,
    # Qwen
    "qwen2_moe": {**QWEN, **SHARED_WIDTH, "mlp_only_layers": [1]},
    "qwen3_moe": {**QWEN, "head_dim": 8, "decoder_sparse_step": 2},
    "qwen3_next": {**QWEN, **SHARED_WIDTH, **DELTA, "head_dim": 8, "mlp_only_layers": [1]},
    "qwen3_5_moe_text": {**QWEN, **SHARED_WIDTH, **DELTA, "head_dim": 8},
    # OLMo
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2},
    "mellum": {**QWEN, **MIXED_MLP, **HYBRID_ATTENTION, "head_dim": 8},
    # DeepSeek and those who follow it
    "deepseek_v2": {
        **MLA,
        **DEEPSEEK,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**MLA, **DEEPSEEK, "first_k_dense_replace": 2},
    "deepseek_v32": {**MLA, **DEEPSEEK, **INDEXER, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "intermediate_size": None,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 12,
        "o_lora_rank": 12,
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
        **INDEXER,
        "hc_mult": 2,
        "sliding_window": 16,
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "axk1": {**MLA, **DEEPSEEK, **MIXED_MLP},
    "glm4_moe": {**DEEPSEEK, "head_dim": 8, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**MLA, **DEEPSEEK, **MIXED_MLP},
    "glm_moe_dsa": {**MLA, **DEEPSEEK, **INDEXER, "first_k_dense_replace": 1},
    "dots1": {**DEEPSEEK, "head_dim": 8, "first_k_dense_replace": 1},
    "solar_open": {**DEEPSEEK, "head_dim": 8},
    "mimo_v2_flash": {
        **DEEPSEEK,
        "n_shared_experts": None,
        **MIXED_MLP,
        **HYBRID_ATTENTION,
        "head_dim": 8,
        "v_head_dim": 6,
    },
    "exaone_moe": {
        **QWEN,
        **HYBRID_ATTENTION,
        "head_dim": 8,
        "num_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "beam": {
        **QWEN,
        **HYBRID_ATTENTION,
        **MIXED_MLP,
        "head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    },
    "bailing_hybrid": {
        **MLA,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        "q_lora_rank": None,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "first_k_dense_replace": 1,
    },
    "kimi_linear": {
        **MLA,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        "q_lora_rank": None,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **MIXED_MLP,
    },
    # others
    "ernie4_5_moe": {
        "moe_intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "head_dim": 8},
    "hy_v3": {**QWEN, **MIXED_MLP, "head_dim": 8, "num_shared_experts": 2},
    "afmoe": {**QWEN, "head_dim": 8, "num_shared_experts": 2, "num_dense_layers": 1}
    | HYBRID_ATTENTION,
    "lfm2_moe": {**QWEN, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "jamba": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 56},
    "granitemoehybrid": {
        **LOCAL,
        "shared_intermediate_size": 56,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "granitemoe_swa": {**LOCAL, "shared_intermediate_size": 56},
    "gpt_oss": {**LOCAL, **HYBRID_ATTENTION, "head_dim": 8},
    "llama4_text": {
        **LOCAL,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
    },
    "dbrx": {
        **dict.fromkeys(COMMON.keys() - {"vocab_size", "initializer_range"}),
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "jetmoe": {**LOCAL, "kv_channels": 8, "num_attention_heads": None},
    "aria_text": {
        "moe_num_experts": 6,
        "moe_topk": 2,
        "moe_num_shared_experts": 3,
        "intermediate_size": 24,
    },
    "cohere2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_shared_experts": 2,
        "intermediate_size": 24,
        "prefix_dense_intermediate_size": 40,
        "head_dim": 8,
        **MIXED_MLP,
    },
    "nemotron_h": {
        **DEEPSEEK,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 56,
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "use_mamba_kernels": False,
    },
    "laguna": {**QWEN, **SHARED_WIDTH, **MIXED_MLP, **HYBRID_ATTENTION, "head_dim": 8}
    | {"moe_routed_scaling_factor": 1.5, "moe_router_logit_softcapping": 3.0},
    "flint": {**QWEN, **SHARED_WIDTH, **HYBRID_ATTENTION, "head_dim": 8, "mlp_only_layers": [0]},
    "kolibri1": {**QWEN, **SHARED_WIDTH, **HYBRID_ATTENTION, "head_dim": 8},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 4,
        **HYBRID_ATTENTION,
    },
    "zaya": {
        "num_experts": 6,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "router_hidden_size": 12,
        "intermediate_size": None,
    },
    "longcat_flash": {
        **MLA,
        "intermediate_size": None,
        "num_hidden_layers": None,
        "num_layers": 2,
        "head_dim": 4,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 6,
        "zero_expert_num": 2,
        "moe_topk": 3,
    },
}

#: Families that transformers knows but cannot build, and why.
UNBUILDABLE: dict[str, str] = {}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A small config of the family; `changes` override entries of the table."""
    entries = {**COMMON, **TINY[model_type], **changes}
    kept = {name: value for name, value in entries.items() if value is not None}
    return AutoConfig.for_model(model_type, **kept)


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """The family's causal language model with seeded random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype)
    return model.eval()


def tiny_checkpoint(
    model_type: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Build the tiny model, save it in `folder`, and return it."""
    model = tiny_model(model_type, dtype, seed, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


logging.getLogger("transformers").setLevel(logging.ERROR)
