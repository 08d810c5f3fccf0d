"""A small dense Llama with weights like trained ones, for tests of surgery and validation."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from moe_compose.checkpoint.reader import Checkpoint


def dense_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Checkpoint:
    """A 3-layer Llama (F 64, D 32, vocabulary 96) whose FFN, norms and rope all matter."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 3e-6,
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
    }
    return dense_checkpoint(LlamaConfig(**{**settings, **changes}), folder, dtype)


def dense_checkpoint(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """A model of `config` with norms around 1, biases, and an FFN and a head that matter; saved by
    transformers.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.1 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(0.1 * torch.randn_like(p))
            elif "mlp" in name:
                p.mul_(6)
            elif "lm_head" in name:
                p.mul_(5)
    model.to(dtype).save_pretrained(folder)
    return Checkpoint.open(folder)
