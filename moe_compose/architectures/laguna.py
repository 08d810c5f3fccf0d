"""Laguna: capped logits, sigmoid, a correction bias stored among the experts, a shared expert."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.common import LLAMA_MLP, QWEN_EXPERTS
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import TypeList
from moe_compose.architectures.routing_form import RoutingForm

LAGUNA = Architecture(
    model_type="laguna",
    hf_class="LagunaForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=256),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="moe_intermediate_size", default=512),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.gate.weight"),
        RouterTensor(
            name="model.layers.{i}.mlp.experts.e_score_correction_bias",
            kind="correction_bias",
            dtype="F32",
        ),
    ),
    shared=SharedExperts(
        matrices=Matrices(
            gate="model.layers.{i}.mlp.shared_expert.gate_proj.weight",
            up="model.layers.{i}.mlp.shared_expert.up_proj.weight",
            down="model.layers.{i}.mlp.shared_expert.down_proj.weight",
        ),
        width=Key(name="shared_expert_intermediate_size", default=512),
    ),
    routing=RoutingForm(
        score="sigmoid",
        renormalise=True,
        scale=Key(name="moe_routed_scaling_factor", default=1.0),
        selection_bias=True,
        softcap=Key(name="moe_router_logit_softcapping", default=0.0),
    ),
    sparse=TypeList(key=Key(name="mlp_layer_types", default=None), first_dense=1),
    per_layer_rope=True,
)
