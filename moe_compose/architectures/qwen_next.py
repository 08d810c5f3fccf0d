"""Qwen3-Next and Qwen3.5: gated delta-rule attention; Qwen2-MoE's shared expert behind a gate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_compose.architectures.base import Computed, Key, Matrices, SharedExperts
from moe_compose.architectures.common import LLAMA_FACTS, LLAMA_MLP
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import EveryLayer
from moe_compose.architectures.qwen import QWEN2_MOE
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

_SHARED = SharedExperts(
    matrices=Matrices(
        gate="model.layers.{i}.mlp.shared_expert.gate_proj.weight",
        up="model.layers.{i}.mlp.shared_expert.up_proj.weight",
        down="model.layers.{i}.mlp.shared_expert.down_proj.weight",
    ),
    width=Key(name="shared_expert_intermediate_size", default=512),
    gate="model.layers.{i}.mlp.shared_expert_gate.weight",
)


def _attention_types(config: Mapping[str, Any]) -> list[str]:
    """Full attention in every fourth layer."""
    every = Key(name="full_attention_interval", default=4).integer(config) or 1
    count = Key(name="num_hidden_layers").integer(config)
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]


QWEN3_5_TEXT = Architecture(
    model_type="qwen3_5_text",
    hf_class="Qwen3_5ForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": False,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "layer_types": Computed(name="layer_types", formula=_attention_types),
    },
    mtp=("mtp.",),
)

QWEN3_NEXT = replace(
    QWEN2_MOE,
    model_type="qwen3_next",
    hf_class="Qwen3NextForCausalLM",
    num_experts=Key(name="num_experts", default=512),
    top_k=Key(name="num_experts_per_tok", default=10),
    expert_width=Key(name="moe_intermediate_size", default=512),
    shared=_SHARED,
    routing=RoutingForm(score="softmax", renormalise=Key(name="norm_topk_prob", default=True)),
    mtp=("mtp.",),
    portable=(),
    twins=(),
)

_QWEN3_5 = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    hf_class="Qwen3_5MoeForCausalLM",
    mlp=None,
    num_experts=Key(name="num_experts", default=256),
    top_k=Key(name="num_experts_per_tok", default=8),
    routing=RoutingForm(score="softmax", renormalise=True),
    sparse=EveryLayer(),
)
_STACKED = replace(
    _QWEN3_5,
    experts=Matrices(
        gate_up="model.layers.{i}.mlp.experts.gate_up_proj",
        down="model.layers.{i}.mlp.experts.down_proj",
    ),
)

#: Qwen publishes the experts stacked, and the text model inside a multimodal one.
QWEN3_5_MOE_TEXT = replace(
    _QWEN3_5,
    layouts=(_STACKED, _STACKED.renamed({"model.": "model.language_model."})),
    twins=(
        Twin(
            dense="qwen3_5_text",
            drop=("full_attention_interval", "mtp_num_hidden_layers"),
        ),
    ),
)
