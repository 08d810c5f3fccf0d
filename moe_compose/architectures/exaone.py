"""EXAONE MoE: DeepSeek-V3's router, its correction bias one module further up."""

from dataclasses import replace

from moe_compose.architectures.base import Key, RouterTensor, SharedExperts
from moe_compose.architectures.deepseek import (
    DEEPSEEK_ROUTER,
    DEEPSEEK_SHARED,
    DEEPSEEK_V3,
    SIGMOID_ROUTING,
)
from moe_compose.architectures.layers import FirstDense

EXAONE_MOE = replace(
    DEEPSEEK_V3,
    model_type="exaone_moe",
    twins=(),
    hf_class="ExaoneMoeForCausalLM",
    num_experts=Key(name="num_experts", default=64),
    expert_width=Key(name="moe_intermediate_size", default=1024),
    router=(
        DEEPSEEK_ROUTER[0],
        RouterTensor(
            name="model.layers.{i}.mlp.e_score_correction_bias",
            kind="correction_bias",
            dtype="F32",
        ),
    ),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1024),
        count=Key(name="num_shared_experts", default=1),
    ),
    routing=SIGMOID_ROUTING,
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=1),
        types=Key(name="mlp_layer_types", default=None),
    ),
    mtp=("mtp.",),
)
