"""A.X K1: a DeepSeek-V3 with one more norm after the experts."""

from dataclasses import replace

from moe_compose.architectures.base import Key
from moe_compose.architectures.deepseek import DEEPSEEK_V3
from moe_compose.architectures.layers import FirstDense

AXK1 = replace(
    DEEPSEEK_V3,
    model_type="axk1",
    twins=(),
    hf_class="AXK1ForCausalLM",
    num_experts=Key(name="n_routed_experts", default=192),
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=1),
        types=Key(name="mlp_layer_types", default=None),
        frequency=Key(name="moe_layer_freq", default=1),
    ),
)
