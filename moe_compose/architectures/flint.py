"""Flint: sigmoid scores without a correction bias, a router in fp32, an ungated shared expert."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.common import LLAMA_MLP, QWEN_EXPERTS
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import StepAndList
from moe_compose.architectures.routing_form import RoutingForm

FLINT = Architecture(
    model_type="flint",
    hf_class="FlintForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=256),
    top_k=Key(name="num_experts_per_tok", default=6),
    expert_width=Key(name="moe_intermediate_size", default=512),
    router=(RouterTensor(name="model.layers.{i}.mlp.gate.weight", dtype="F32"),),
    shared=SharedExperts(
        matrices=Matrices(
            gate="model.layers.{i}.mlp.shared_expert.gate_proj.weight",
            up="model.layers.{i}.mlp.shared_expert.up_proj.weight",
            down="model.layers.{i}.mlp.shared_expert.down_proj.weight",
        ),
        width=Key(name="shared_expert_intermediate_size", default=1024),
    ),
    routing=RoutingForm(score="sigmoid", renormalise=Key(name="norm_topk_prob", default=True)),
    sparse=StepAndList(dense=Key(name="mlp_only_layers", default=(0, 1))),
)
