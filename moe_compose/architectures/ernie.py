"""ERNIE 4.5: softmax, a correction bias of shape `[1, E]`, and a lower bound for the weights' sum.

The sparse layers are a run between two indices; with an interval, every so-many-th of it.
"""

from moe_compose.architectures.base import Key, RouterTensor, SharedExperts
from moe_compose.architectures.common import (
    FULL_ROPE,
    LLAMA_BIASES,
    LLAMA_FACTS,
    LLAMA_MLP,
    NO_ATTENTION_BIAS,
    NO_BIAS,
    NO_MLP_BIAS,
    QWEN_EXPERTS,
    head_dim,
    key_value_heads,
)
from moe_compose.architectures.deepseek import DEEPSEEK_SHARED
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import Interval
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

#: Llama with interleaved rotary pairs.
ERNIE4_5 = Architecture(
    model_type="ernie4_5",
    hf_class="Ernie4_5ForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "head_dim": head_dim(128),
        "num_key_value_heads": key_value_heads(2),
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "use_bias": False,
    },
)

ERNIE4_5_MOE = Architecture(
    model_type="ernie4_5_moe",
    hf_class="Ernie4_5_MoeForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="moe_num_experts", default=64),
    top_k=Key(name="moe_k", default=6),
    expert_width=Key(name="moe_intermediate_size", default=1536),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.gate.weight", dtype="F32"),
        RouterTensor(
            name="model.layers.{i}.mlp.moe_statics.e_score_correction_bias",
            kind="correction_bias",
            dim=1,
            lead=1,
            dtype="F32",
        ),
    ),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1536),
        count=Key(name="moe_num_shared_experts", default=2),
        optional=True,
    ),
    routing=RoutingForm(
        score="softmax",
        renormalise=True,
        floor=Key(name="moe_norm_min", default=1e-12),
        selection_bias=True,
    ),
    sparse=Interval(
        start=Key(name="moe_layer_start_index", default=1),
        end=Key(name="moe_layer_end_index", default=-1),
        step=Key(name="moe_layer_interval", default=1),
    ),
    mtp=("model.mtp_",),
    twins=(
        Twin(dense="ernie4_5", requires=(NO_BIAS, FULL_ROPE)),
        Twin(
            dense="llama",
            config={"use_bias": False},
            drop=LLAMA_BIASES,
            requires=(NO_ATTENTION_BIAS, NO_MLP_BIAS, FULL_ROPE),
            interleave=(
                "model.layers.{i}.self_attn.q_proj.weight",
                "model.layers.{i}.self_attn.k_proj.weight",
            ),
        ),
    ),
)
