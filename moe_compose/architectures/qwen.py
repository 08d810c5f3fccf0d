"""Qwen2 and Qwen3, dense and MoE.

`norm_topk_prob` is false unless the config says otherwise: a copy with the default loses most of
the FFN. Qwen2-MoE always has a shared expert behind a sigmoid gate.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.common import (
    FULL_ATTENTION,
    FULL_ROPE,
    LLAMA_BIASES,
    LLAMA_FACTS,
    LLAMA_MLP,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    NO_WINDOW,
    QWEN_EXPERTS,
    QWEN_WINDOW,
    WHOLE_HEADS,
    key_value_heads,
)
from moe_compose.architectures.family import Architecture, Portable
from moe_compose.architectures.layers import StepAndList
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

QWEN_FACTS = {
    **LLAMA_FACTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": key_value_heads(32),
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
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

_SPARSE_ONLY = "SGLang is silently wrong, llama.cpp refuses"

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
    portable=(
        Portable(
            key=Key(name="norm_topk_prob", default=False),
            allowed=(True,),
            breaks="llama.cpp silently renormalises all the same",
        ),
    ),
    sparse_only=_SPARSE_ONLY,
    twins=(
        Twin(
            dense="qwen3",
            config={"norm_topk_prob": True},
            unnormalised_config={"norm_topk_prob": False},
            drop=QWEN_WINDOW,
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
    portable=(
        Portable(
            key=Key(name="norm_topk_prob", default=False),
            allowed=(False,),
            breaks="llama.cpp and mlx-lm silently do not renormalise; --method shared avoids it",
        ),
        Portable(
            key=Key(name="tie_word_embeddings", default=False),
            allowed=(False,),
            breaks="llama.cpp and mlx-lm expect an output projection of its own",
        ),
    ),
    sparse_only=_SPARSE_ONLY,
    twins=(
        Twin(
            dense="qwen2",
            config={"norm_topk_prob": True, "qkv_bias": True},
            unnormalised_config={"norm_topk_prob": False},
            # llama.cpp and mlx ignore norm_topk_prob = true; with routed outputs at zero it need
            # not be.
            shared_config={"norm_topk_prob": False},
            drop=QWEN_WINDOW,
            requires=(NO_WINDOW, FULL_ATTENTION, FULL_ROPE, WHOLE_HEADS),
        ),
        Twin(
            dense="llama",
            config={"norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": False},
            unnormalised_config={"norm_topk_prob": False},
            shared_config={"norm_topk_prob": False},
            drop=(*LLAMA_BIASES, *QWEN_WINDOW),
            requires=(NO_ATTENTION_BIAS, NO_MLP_BIAS, FULL_ROPE, WHOLE_HEADS),
        ),
    ),
)
