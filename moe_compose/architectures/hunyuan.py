"""Tencent's Hunyuan. V1: a plain softmax router in fp32, one shared MLP of the experts' width.
V3: DeepSeek-V3's router under other names.
"""

from dataclasses import replace

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.common import (
    FULL_ROPE,
    HEAD_DIM,
    LLAMA_FACTS,
    LLAMA_MLP,
    QWEN_EXPERTS,
)
from moe_compose.architectures.deepseek import MTP_LAYERS, SIGMOID_ROUTING
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import TypeList
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

_SHARED = Matrices(
    gate="model.layers.{i}.mlp.shared_mlp.gate_proj.weight",
    up="model.layers.{i}.mlp.shared_mlp.up_proj.weight",
    down="model.layers.{i}.mlp.shared_mlp.down_proj.weight",
)

HUNYUAN_V1_DENSE = Architecture(
    model_type="hunyuan_v1_dense",
    hf_class="HunYuanDenseV1ForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "rms_norm_eps": 1e-5,
        "head_dim": HEAD_DIM,
        "pad_token_id": 0,
        "attention_bias": False,
    },
)

HUNYUAN_V1_MOE = Architecture(
    model_type="hunyuan_v1_moe",
    hf_class="HunYuanMoEV1ForCausalLM",
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=1),
    top_k=Key(name="moe_topk", default=1),
    expert_width=Key(name="intermediate_size", default=11008),
    router=(RouterTensor(name="model.layers.{i}.mlp.gate.wg.weight", dtype="F32"),),
    shared=SharedExperts(matrices=_SHARED, width=Key(name="intermediate_size", default=11008)),
    routing=RoutingForm(score="softmax", renormalise=True),
    twins=(Twin(dense="hunyuan_v1_dense", requires=(FULL_ROPE,)),),
    note="counts may be given per layer; they are read when all layers agree",
)

HY_V3 = Architecture(
    model_type="hy_v3",
    hf_class="HYV3ForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=192),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="moe_intermediate_size", default=1536),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.router.gate.weight"),
        RouterTensor(name="model.layers.{i}.mlp.expert_bias", kind="correction_bias", dtype="F32"),
    ),
    shared=SharedExperts(
        matrices=_SHARED,
        width=Key(name="moe_intermediate_size", default=1536),
        count=Key(name="num_shared_experts", default=1),
    ),
    routing=replace(
        SIGMOID_ROUTING,
        renormalise=True,
        scale=Key(name="router_scaling_factor", default=2.826),
        groups=1,
        top_groups=1,
    ),
    sparse=TypeList(key=Key(name="mlp_layer_types", default=None), first_dense=1),
    mtp=MTP_LAYERS,
)
