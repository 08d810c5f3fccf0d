"""Beam: DeepSeek-V3's router in fp32, no shared expert; the scale multiplies the summed experts."""

from dataclasses import replace

from moe_compose.architectures.base import Key, RouterTensor
from moe_compose.architectures.deepseek import DEEPSEEK_ROUTER, DEEPSEEK_V3, SIGMOID_ROUTING
from moe_compose.architectures.layers import TypeList

BEAM = replace(
    DEEPSEEK_V3,
    model_type="beam",
    twins=(),
    hf_class="BeamForCausalLM",
    num_experts=Key(name="num_experts", default=256),
    expert_width=Key(name="moe_intermediate_size", default=2560),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.gate.weight", dtype="F32"),
        DEEPSEEK_ROUTER[1],
    ),
    shared=None,
    routing=replace(
        SIGMOID_ROUTING,
        groups=Key(name="n_group", default=8),
        top_groups=Key(name="topk_group", default=4),
    ),
    sparse=TypeList(key=Key(name="mlp_layer_types", default=None), first_dense=3),
    mtp=(),
    per_layer_rope=True,
)
