"""GLM-4.5 and later: DeepSeek-V3's experts and router; attention is GLM's, MLA, or sparse MLA."""

from dataclasses import replace

from moe_compose.architectures.base import Key, SharedExperts
from moe_compose.architectures.common import (
    FULL_ATTENTION,
    FULL_ROPE,
    LLAMA_BIASES,
    LLAMA_FACTS,
    LLAMA_MLP,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    NO_OUTPUT_BIAS,
    NO_WINDOW,
    NO_WINDOW_AT_ALL,
    PHI3_QKV,
    PHI3_ROPE,
    QWEN_WINDOW,
    head_dim,
    key_value_heads,
)
from moe_compose.architectures.deepseek import (
    DEEPSEEK_SHARED,
    DEEPSEEK_V3,
    SIGMOID_ROUTING,
    WEIGHTS_SUM_TO_1,
)
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import FirstDense, TypeList
from moe_compose.architectures.twin import Require, Twin

#: ByteDance's Seed-OSS: Llama with biases on queries, keys and values.
SEED_OSS = Architecture(
    model_type="seed_oss",
    hf_class="SeedOssForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "head_dim": head_dim(128),
        "num_key_value_heads": key_value_heads(8),
        "max_position_embeddings": 524288,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
)

#: GLM-4.5's class rotates half of each head unless told otherwise, and predicts a further token.
_EXACT = {**WEIGHTS_SUM_TO_1, "num_nextn_predict_layers": 0}
_WHOLE = {**_EXACT, "partial_rotary_factor": 1.0}
_PLAIN = {"attention_bias": False, "use_qk_norm": False}

GLM4_MOE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe",
    hf_class="Glm4MoeForCausalLM",
    num_experts=Key(name="n_routed_experts", default=128),
    expert_width=Key(name="moe_intermediate_size", default=1408),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1408),
        count=Key(name="n_shared_experts", default=1),
    ),
    routing=replace(SIGMOID_ROUTING, scale=Key(name="routed_scaling_factor", default=1.0)),
    sparse=FirstDense(key=Key(name="first_k_dense_replace", default=1)),
    twins=(
        Twin(
            dense="llama",
            config={**_WHOLE, **_PLAIN},
            drop=LLAMA_BIASES,
            requires=(NO_ATTENTION_BIAS, NO_MLP_BIAS, FULL_ROPE),
        ),
        Twin(
            dense="qwen2",
            config={**_WHOLE, "attention_bias": True, "use_qk_norm": False},
            drop=QWEN_WINDOW,
            requires=(NO_WINDOW, FULL_ATTENTION, FULL_ROPE),
        ),
        Twin(
            dense="qwen3",
            config={**_WHOLE, "use_qk_norm": True},
            drop=QWEN_WINDOW,
            requires=(NO_OUTPUT_BIAS, NO_WINDOW, FULL_ATTENTION, FULL_ROPE),
        ),
        Twin(
            dense="seed_oss",
            config={**_WHOLE, "use_qk_norm": False},
            drop=("attention_out_bias", "residual_dropout", "mlp_bias", "pretraining_tp"),
            requires=(
                Require(
                    key=Key(name="attention_out_bias", default=False),
                    allowed=(False,),
                    reason="the target has no bias on the attention's output projection",
                ),
                NO_MLP_BIAS,
                FULL_ROPE,
            ),
        ),
        Twin(
            dense="phi3",
            config={
                **_EXACT,
                **_PLAIN,
                "partial_rotary_factor": Key(name="partial_rotary_factor", default=1.0),
            },
            drop=("sliding_window", "embd_pdrop", "resid_pdrop"),
            splits=(PHI3_QKV,),
            requires=(NO_WINDOW_AT_ALL, PHI3_ROPE),
        ),
    ),
)

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    twins=(),
    hf_class="Glm4MoeLiteForCausalLM",
    num_experts=Key(name="n_routed_experts", default=64),
    top_k=Key(name="num_experts_per_tok", default=4),
    expert_width=Key(name="moe_intermediate_size", default=1536),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1536),
        count=Key(name="n_shared_experts", default=1),
    ),
    routing=replace(SIGMOID_ROUTING, scale=Key(name="routed_scaling_factor", default=1.8)),
    sparse=TypeList(key=Key(name="mlp_layer_types", default=None), first_dense=1),
    note="transformers reads mlp_layer_types only, other engines first_k_dense_replace",
)

GLM_MOE_DSA = replace(
    DEEPSEEK_V3,
    model_type="glm_moe_dsa",
    twins=(),
    hf_class="GlmMoeDsaForCausalLM",
    routing=SIGMOID_ROUTING,
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=3),
        types=Key(name="mlp_layer_types", default=None),
    ),
)
