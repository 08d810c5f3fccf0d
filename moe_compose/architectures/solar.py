"""Solar Open: Llama's attention with DeepSeek-V3's experts in every layer."""

from dataclasses import replace

from moe_compose.architectures.base import Key, SharedExperts
from moe_compose.architectures.common import FULL_ROPE, LLAMA_BIASES, NO_ATTENTION_BIAS, NO_MLP_BIAS
from moe_compose.architectures.deepseek import (
    DEEPSEEK_SHARED,
    DEEPSEEK_V3,
    SIGMOID_ROUTING,
    WEIGHTS_SUM_TO_1,
)
from moe_compose.architectures.layers import EveryLayer
from moe_compose.architectures.twin import Twin

SOLAR_OPEN = replace(
    DEEPSEEK_V3,
    model_type="solar_open",
    twins=(
        Twin(
            dense="llama",
            config={**WEIGHTS_SUM_TO_1, "attention_bias": False},
            drop=LLAMA_BIASES,
            requires=(NO_ATTENTION_BIAS, NO_MLP_BIAS, FULL_ROPE),
        ),
    ),
    hf_class="SolarOpenForCausalLM",
    mlp=None,
    num_experts=Key(name="n_routed_experts", default=128),
    expert_width=Key(name="moe_intermediate_size", default=1280),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1280),
        count=Key(name="n_shared_experts", default=1),
    ),
    routing=replace(SIGMOID_ROUTING, scale=Key(name="routed_scaling_factor", default=1.0)),
    sparse=EveryLayer(),
    mtp=(),
)
