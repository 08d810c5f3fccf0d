"""Shapes of forms that several lineages share: Llama's FFN, its defaults, and what a target often
has no home for.
"""

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures.base import Computed, Key, Matrices
from moe_compose.architectures.twin import Require, Split

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


def _head_dim(config: Mapping[str, Any]) -> int:
    stated = config.get("head_dim")
    if isinstance(stated, int) and stated:
        return stated
    hidden, heads = Key(name="hidden_size"), Key(name="num_attention_heads")
    return hidden.integer(config) // max(1, heads.integer(config))


#: The width of a head where the config need not say it.
HEAD_DIM = Computed(name="head_dim", formula=_head_dim)

#: Softmax scale of all but the families that make it an entry (Granite).
ATTENTION_SCALE = Computed(name="head_dim ** -0.5", formula=lambda c: _head_dim(c) ** -0.5)

QUERY_ROWS = (Key(name="num_attention_heads"), HEAD_DIM)
KEY_ROWS = (Key(name="num_key_value_heads"), HEAD_DIM)

#: Phi-3's fused projection, as Llama's three.
PHI3_QKV = Split(
    source="model.layers.{i}.self_attn.qkv_proj.weight",
    parts=(
        ("model.layers.{i}.self_attn.q_proj.weight", QUERY_ROWS),
        ("model.layers.{i}.self_attn.k_proj.weight", KEY_ROWS),
        ("model.layers.{i}.self_attn.v_proj.weight", KEY_ROWS),
    ),
)

#: As many key-value heads as query heads, where the config does not say.
ALL_HEADS = Key(name="num_attention_heads")


def null_means(name: str, meaning: Key, default: int) -> Computed:
    """`default` when the entry is absent, `meaning` when it is null."""

    def formula(config: Mapping[str, Any]) -> Any:
        stated = config.get(name, default)
        return meaning.get(config) if stated is None else stated

    return Computed(name=name, formula=formula)


def key_value_heads(default: int) -> Computed:
    """The fact `num_key_value_heads` of a class whose default is `default`."""
    return null_means("num_key_value_heads", ALL_HEADS, default)


def head_dim(default: int) -> Computed:
    """The fact `head_dim` of a class whose default is `default`."""
    return null_means("head_dim", HEAD_DIM, default)


#: What Llama's config class assumes when silent; other families state where they differ.
LLAMA_FACTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "num_key_value_heads": ALL_HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _effective_window(config: Mapping[str, Any]) -> Any:
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(context, int) and window >= context:
        return None
    return window


NO_ATTENTION_BIAS = Require(
    key=Key(name="attention_bias", default=False),
    allowed=(False,),
    reason="the target's attention has no biases",
)
NO_OUTPUT_BIAS = Require(
    key=Key(name="attention_bias", default=False),
    allowed=(False,),
    reason="it includes one on the output projection, which the target has not",
)
NO_BIAS = Require(
    key=Key(name="use_bias", default=False),
    allowed=(False,),
    reason="the target's experts have no biases",
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
NO_WINDOW_AT_ALL = Require(
    key=Computed(name="sliding_window", formula=_effective_window),
    allowed=(None,),
    reason="the target's attention sees the whole context",
)
PHI3_ROPE = Require(
    key=Computed(name="rope_type", formula=lambda c: c["rope_parameters"].get("rope_type")),
    allowed=("default", "longrope"),
    reason="Phi-3 takes every other name to mean longrope, the target does not; write longrope",
)
FULL_ATTENTION = Require(
    key=Key(name="layer_types", default=("full_attention",)),
    allowed=("full_attention",),
    reason="the target has full attention in every layer",
)
WHOLE_HEADS = Require(
    key=Computed(
        name="num_attention_heads * head_dim / hidden_size",
        formula=lambda c: ALL_HEADS.integer(c) * _head_dim(c) / Key(name="hidden_size").integer(c),
    ),
    allowed=(1,),
    reason="the target's heads are hidden_size / num_attention_heads wide, and its config has no "
    "entry for another head_dim",
)

#: Entries of the Qwen families about windows, none of which a target without windows knows.
QWEN_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
#: Entries of Llama and its relatives that say what a target without biases takes for granted.
LLAMA_BIASES = ("attention_bias", "mlp_bias", "pretraining_tp")
