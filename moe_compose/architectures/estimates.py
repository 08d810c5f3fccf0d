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
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (
        isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int) and heads
    ):
        return None
    latent = config.get("kv_lora_rank")
    if isinstance(latent, int):  # multi-head latent attention keeps one compressed vector
        return 2 * layers * (latent + int(config.get("qk_rope_head_dim") or 0))
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        layers = sum("attention" in str(k) and "linear" not in str(k) for k in kinds)
    head_dim = config.get("head_dim") or hidden // heads
    return 2 * 2 * layers * int(config.get("num_key_value_heads") or heads) * int(head_dim)
