"""Memory to serve a model, from its config and parameter count. Estimates: what they leave out is
said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bytes of one parameter as served. Four bits carry half a bit of scales in the usual group sizes.
SERVING_BYTES: Mapping[str, float] = {"F32": 4.0, "BF16": 2.0, "FP8": 1.0, "4-bit": 0.5625}


@dataclass(frozen=True, slots=True)
class ServingMemory:
    """Bytes to hold a model and its cache; activations and the engine's own memory come on top
    (10-20 %, as a rule).

    Attributes:
        weights: serving dtype → bytes of all parameters.
        cache_per_token: bytes of the key-value cache of one token in bf16; None where the config
            does not tell.
        context: `max_position_embeddings`, 0 when absent.
    """

    weights: Mapping[str, int]
    cache_per_token: int | None
    context: int


def serving_memory(config: Mapping[str, Any], parameters: int) -> ServingMemory:
    """Memory to serve `parameters` parameters under `config`."""
    weights = {name: round(parameters * size) for name, size in SERVING_BYTES.items()}
    context = config.get("max_position_embeddings")
    return ServingMemory(
        weights, _cache_per_token(config), context if isinstance(context, int) else 0
    )


def _cache_per_token(config: Mapping[str, Any]) -> int | None:
    """bf16 bytes of keys and values of one token over all layers, ignoring windows (an upper
    bound).
    """

    def entry(name: str) -> int:
        value = config.get(name)
        return value if isinstance(value, int) and value > 0 else 0

    layers, heads = entry("num_hidden_layers"), entry("num_attention_heads")
    if not (layers and heads and entry("hidden_size")):
        return None
    if latent := entry("kv_lora_rank"):  # multi-head latent attention keeps one compressed vector
        return 2 * layers * (latent + entry("qk_rope_head_dim"))
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        layers = sum("attention" in str(k) and "linear" not in str(k) for k in kinds)
    head_dim = entry("head_dim") or entry("hidden_size") // heads
    return 2 * 2 * layers * (entry("num_key_value_heads") or heads) * head_dim
