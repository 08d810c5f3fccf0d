"""Cohere 2 MoE: top-k of the logits, then softmax or sigmoid; routed and shared output averaged.

The dense layers at the front have a width of their own.
"""

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures.base import Computed, Key, RouterTensor, SharedExperts
from moe_compose.architectures.common import ALL_HEADS, FULL_ROPE, HEAD_DIM, LLAMA_MLP, QWEN_EXPERTS
from moe_compose.architectures.deepseek import DEEPSEEK_SHARED
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import FirstDense
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin


def _attention_types(config: Mapping[str, Any]) -> list[str]:
    """A window on all layers but every fourth, which has no rotary embedding either."""
    every = Key(name="sliding_window_pattern", default=4).integer(config) or 1
    count = Key(name="num_hidden_layers").integer(config)
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]


COHERE2 = Architecture(
    model_type="cohere2",
    hf_class="Cohere2ForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "num_key_value_heads": ALL_HEADS,
        "head_dim": HEAD_DIM,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": Computed(name="layer_types", formula=_attention_types),
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "pad_token_id": 0,
    },
)

COHERE2_MOE = Architecture(
    model_type="cohere2_moe",
    hf_class="Cohere2MoeForCausalLM",
    mlp=LLAMA_MLP,
    width=Key(name="prefix_dense_intermediate_size"),
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=8),
    top_k=Key(name="num_experts_per_tok", default=2),
    expert_width=Key(name="intermediate_size", default=22528),
    router=(RouterTensor(name="model.layers.{i}.mlp.gate.weight"),),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="intermediate_size", default=22528),
        count=Key(name="num_shared_experts", default=0),
        average=Key(
            name="shared_expert_combination_strategy",
            default="average",
            values={"average": True, "sum": False},
        ),
        optional=True,
    ),
    routing=RoutingForm(
        score=Key(
            name="expert_selection_fn",
            default="softmax",
            values={"softmax": "topk_softmax", "sigmoid": "topk_sigmoid"},
        ),
        renormalise=Key(name="norm_topk_prob", default=True),
    ),
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=0),
        types=Key(name="mlp_layer_types", default=None),
    ),
    twins=(
        Twin(
            dense="cohere2",
            config={
                "expert_selection_fn": "softmax",
                "norm_topk_prob": True,
                "shared_expert_combination_strategy": "sum",
                "rms_norm_eps": None,
                "prefix_dense_intermediate_size": Key(name="intermediate_size"),
                # With the default of 1 a dense layer rotates even where it has no window.
                "prefix_dense_sliding_window_pattern": 4,
            },
            drop=("sliding_window_pattern",),
            requires=(FULL_ROPE,),
        ),
    ),
)
