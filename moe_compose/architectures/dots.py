"""dots.llm1: Qwen3's attention with DeepSeek-V3's experts."""

from dataclasses import replace

from moe_compose.architectures.base import Key, SharedExperts
from moe_compose.architectures.common import FULL_ATTENTION, FULL_ROPE, NO_WINDOW, QWEN_WINDOW
from moe_compose.architectures.deepseek import (
    DEEPSEEK_SHARED,
    DEEPSEEK_V3,
    SIGMOID_ROUTING,
    WEIGHTS_SUM_TO_1,
)
from moe_compose.architectures.layers import FirstDense
from moe_compose.architectures.twin import Twin

DOTS1 = replace(
    DEEPSEEK_V3,
    model_type="dots1",
    twins=(
        Twin(
            dense="qwen3",
            config={**WEIGHTS_SUM_TO_1, "sliding_window": None},
            drop=QWEN_WINDOW,
            requires=(NO_WINDOW, FULL_ATTENTION, FULL_ROPE),
        ),
    ),
    hf_class="Dots1ForCausalLM",
    num_experts=Key(name="n_routed_experts"),
    top_k=Key(name="num_experts_per_tok"),
    expert_width=Key(name="moe_intermediate_size", default=1408),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1408),
        count=Key(name="n_shared_experts"),
    ),
    routing=replace(
        SIGMOID_ROUTING,
        renormalise=Key(name="norm_topk_prob", default=False),
        scale=Key(name="routed_scaling_factor", default=1.0),
    ),
    sparse=FirstDense(key=Key(name="first_k_dense_replace", default=0)),
    mtp=(),
)
