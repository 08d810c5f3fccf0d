"""Qwen2 and Qwen3, dense and MoE.

`norm_topk_prob` is false unless the config says otherwise: a copy with the default loses most of
the FFN. Qwen2-MoE always has a shared expert behind a sigmoid gate.
"""

from moe_compose.architectures.base import (
    Key,
    Matrices,
    RouterTensor,
    RoutingForm,
    SharedExperts,
)
from moe_compose.architectures.common import (
    FULL_ATTENTION,
    FULL_ROPE,
    LLAMA_FACTS,
    LLAMA_MLP,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    NO_WINDOW,
    QWEN_EXPERTS,
)
from moe_compose.architectures.family import Architecture, Twin
from moe_compose.architectures.layers import StepAndList

QWEN_FACTS = {
    **LLAMA_FACTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
}

QWEN2 = Architecture(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    mlp=LLAMA_MLP,
    facts=QWEN_FACTS,
)

QWEN3 = Architecture(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    mlp=LLAMA_MLP,
    facts={**QWEN_FACTS, "head_dim": 128, "attention_bias": False},
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", aliases=("num_local_experts",), default=128),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="moe_intermediate_size", default=768),
    router=(RouterTensor(name="model.layers.{i}.mlp.gate.weight"),),
    routing=RoutingForm(score="softmax", renormalise=Key(name="norm_topk_prob", default=False)),
    sparse=StepAndList(),
    twins=(
        Twin(
            dense="qwen3",
            config={"norm_topk_prob": True},
            drop=("layer_types", "max_window_layers"),
            requires=(NO_WINDOW, FULL_ATTENTION, FULL_ROPE),
        ),
    ),
)

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=60),
    top_k=Key(name="num_experts_per_tok", default=4),
    expert_width=Key(name="moe_intermediate_size", default=1408),
    router=(RouterTensor(name="model.layers.{i}.mlp.gate.weight"),),
    shared=SharedExperts(
        matrices=Matrices(
            gate="model.layers.{i}.mlp.shared_expert.gate_proj.weight",
            up="model.layers.{i}.mlp.shared_expert.up_proj.weight",
            down="model.layers.{i}.mlp.shared_expert.down_proj.weight",
        ),
        width=Key(name="shared_expert_intermediate_size", default=5632),
        gate="model.layers.{i}.mlp.shared_expert_gate.weight",
    ),
    routing=RoutingForm(score="softmax", renormalise=Key(name="norm_topk_prob", default=False)),
    sparse=StepAndList(),
    twins=(
        Twin(
            dense="qwen2",
            config={"norm_topk_prob": True, "qkv_bias": True},
            # llama.cpp and mlx ignore norm_topk_prob = true; with routed outputs at zero it need
            # not be.
            shared_config={"norm_topk_prob": False},
            drop=("layer_types", "max_window_layers"),
            requires=(NO_WINDOW, FULL_ATTENTION, FULL_ROPE),
        ),
        Twin(
            dense="llama",
            config={"norm_topk_prob": True, "qkv_bias": False},
            shared_config={"norm_topk_prob": False},
            drop=("attention_bias", "mlp_bias", "pretraining_tp"),
            requires=(NO_ATTENTION_BIAS, NO_MLP_BIAS, FULL_ROPE),
        ),
    ),
)
