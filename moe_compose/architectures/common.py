"""Shapes of forms that several lineages share: Llama's FFN, its defaults, and what a target often
has no home for.
"""

from moe_compose.architectures.base import Key, Matrices
from moe_compose.architectures.family import Require

LLAMA_MLP = Matrices(
    gate="model.layers.{i}.mlp.gate_proj.weight",
    up="model.layers.{i}.mlp.up_proj.weight",
    down="model.layers.{i}.mlp.down_proj.weight",
)

#: Experts named as most families name them (Qwen, OLMoE, DeepSeek, GLM, ...).
QWEN_EXPERTS = Matrices(
    gate="model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    up="model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    down="model.layers.{i}.mlp.experts.{e}.down_proj.weight",
)

#: What Llama's config class assumes when silent; other families state where they differ.
LLAMA_FACTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "num_key_value_heads": Key(name="num_attention_heads"),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

NO_ATTENTION_BIAS = Require(
    key=Key(name="attention_bias", default=False),
    allowed=(False,),
    reason="the target's attention has no biases",
)
NO_MLP_BIAS = Require(
    key=Key(name="mlp_bias", default=False),
    allowed=(False,),
    reason="the target's experts have no biases",
)
FULL_ROPE = Require(
    key=Key(name="partial_rotary_factor", default=1.0),
    allowed=(1, 1.0),
    reason="the target rotates whole heads",
)
NO_WINDOW = Require(
    key=Key(name="use_sliding_window", default=False),
    allowed=(False,),
    reason="the target has no sliding window on some layers only",
)
FULL_ATTENTION = Require(
    key=Key(name="layer_types", default=("full_attention",)),
    allowed=("full_attention",),
    reason="the target has full attention in every layer",
)
