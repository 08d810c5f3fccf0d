"""Aria's text model: experts stacked and transposed under `fc1` (gate and up) and `fc2`."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.deepseek import DEEPSEEK_SHARED
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

ARIA_TEXT = Architecture(
    model_type="aria_text",
    hf_class="AriaTextForCausalLM",
    experts=Matrices(
        gate_up="model.layers.{i}.mlp.experts.fc1.weight",
        down="model.layers.{i}.mlp.experts.fc2.weight",
        transposed=True,
    ),
    num_experts=Key(name="moe_num_experts", default=8),
    top_k=Key(name="moe_topk", default=2),
    expert_width=Key(name="intermediate_size", default=4096),
    router=(RouterTensor(name="model.layers.{i}.mlp.router.weight"),),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="intermediate_size", default=4096),
        count=Key(name="moe_num_shared_experts", default=2),
    ),
    routing=RoutingForm(score="topk_softmax"),
)
