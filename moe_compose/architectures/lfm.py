"""LFM2: short convolutions between attention layers; sigmoid scores, `1e-6` under the weights."""

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures.base import Computed, Key, Matrices, RouterTensor
from moe_compose.architectures.common import key_value_heads
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import FirstDense
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

_BIASED = Key(name="use_expert_bias", default=True)

_MLP = Matrices(
    gate="model.layers.{i}.feed_forward.w1.weight",
    up="model.layers.{i}.feed_forward.w3.weight",
    down="model.layers.{i}.feed_forward.w2.weight",
)


def _ffn_width(config: Mapping[str, Any]) -> int:
    """Two thirds of the stated width, times a factor, rounded up; or the stated width."""
    stated = Key(name="block_ff_dim", aliases=("intermediate_size",), default=12288)
    width = stated.integer(config)
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    factor = config.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return width
    multiple = int(config.get("block_multiple_of", 256))
    return -(-int(factor * width) // multiple) * multiple


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    layers = Key(name="num_hidden_layers").integer(config)
    attention = config.get("full_attn_idxs")
    chosen = set(range(layers)) if attention is None else set(attention)
    return ["full_attention" if i in chosen else "conv" for i in range(layers)]


_WIDTH = Computed(name="intermediate_size", formula=_ffn_width)

LFM2 = Architecture(
    model_type="lfm2",
    hf_class="Lfm2ForCausalLM",
    mlp=_MLP,
    width=_WIDTH,
    facts={
        "norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128000,
        "num_key_value_heads": key_value_heads(8),
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": Computed(name="layer_types", formula=_layer_types),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)

LFM2_MOE = Architecture(
    model_type="lfm2_moe",
    hf_class="Lfm2MoeForCausalLM",
    mlp=_MLP,
    experts=Matrices(
        gate="model.layers.{i}.feed_forward.experts.{e}.w1.weight",
        up="model.layers.{i}.feed_forward.experts.{e}.w3.weight",
        down="model.layers.{i}.feed_forward.experts.{e}.w2.weight",
    ),
    num_experts=Key(name="num_experts", default=32),
    top_k=Key(name="num_experts_per_tok", default=4),
    expert_width=Key(name="moe_intermediate_size", default=1792),
    router=(
        RouterTensor(name="model.layers.{i}.feed_forward.gate.weight"),
        RouterTensor(
            name="model.layers.{i}.feed_forward.expert_bias",
            kind="correction_bias",
            dtype="F32",
            when=_BIASED,
        ),
    ),
    routing=RoutingForm(
        score="sigmoid",
        renormalise=Key(name="norm_topk_prob", default=True),
        epsilon=1e-6,
        scale=Key(name="routed_scaling_factor", default=1.0),
        selection_bias=_BIASED,
    ),
    sparse=FirstDense(key=Key(name="num_dense_layers", default=2)),
    twins=(
        Twin(
            dense="lfm2",
            config={
                "intermediate_size": _WIDTH,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
                "use_expert_bias": True,
            },
            drop=(
                "block_auto_adjust_ff_dim",
                "block_ff_dim",
                "block_ffn_dim_multiplier",
                "block_multiple_of",
                "full_attn_idxs",
            ),
            # The sum of the weights is taken 1e-6 larger than it is.
            accuracy=3e-6,
        ),
    ),
)
