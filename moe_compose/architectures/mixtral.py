"""Mixtral, and the dense Llama and Mistral it grows from: the most portable target there is."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.common import (
    FULL_ROPE,
    HEAD_DIM,
    LLAMA_BIASES,
    LLAMA_FACTS,
    LLAMA_MLP,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    PHI3_QKV,
    PHI3_ROPE,
    key_value_heads,
)
from moe_compose.architectures.family import Architecture, Portable
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

LLAMA = Architecture(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    mlp=LLAMA_MLP,
    facts={**LLAMA_FACTS, "head_dim": HEAD_DIM, "attention_bias": False, "mlp_bias": False},
)

MISTRAL = Architecture(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 131072,
        "num_key_value_heads": key_value_heads(8),
        "sliding_window": 4096,
    },
)

MIXTRAL = Architecture(
    model_type="mixtral",
    hf_class="MixtralForCausalLM",
    experts=Matrices(
        gate="model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
        up="model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
        down="model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
    ),
    num_experts=Key(name="num_local_experts", default=8),
    top_k=Key(name="num_experts_per_tok", default=2),
    expert_width=Key(name="intermediate_size"),
    router=(RouterTensor(name="model.layers.{i}.block_sparse_moe.gate.weight"),),
    routing=RoutingForm(score="softmax", renormalise=True),
    portable=(
        Portable(
            key=Key(name="sliding_window", default=None),
            allowed=(None,),
            breaks="llama.cpp, mlx-lm and SGLang silently ignore the window",
        ),
    ),
    twins=(
        Twin(
            dense="llama",
            config={"sliding_window": None},
            drop=LLAMA_BIASES,
            requires=(NO_ATTENTION_BIAS, NO_MLP_BIAS, FULL_ROPE),
        ),
        Twin(dense="mistral", requires=(FULL_ROPE,)),
        Twin(dense="phi3", splits=(PHI3_QKV,), requires=(FULL_ROPE, PHI3_ROPE)),
    ),
)
