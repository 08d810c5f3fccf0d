"""JetMoE: experts in the FFN *and* in attention, each with a router, both counted by one entry."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

JETMOE = Architecture(
    model_type="jetmoe",
    hf_class="JetMoeForCausalLM",
    experts=Matrices(
        gate_up="model.layers.{i}.mlp.input_linear.weight",
        down="model.layers.{i}.mlp.output_linear.weight",
    ),
    num_experts=Key(name="num_local_experts", default=8),
    top_k=Key(name="num_experts_per_tok", default=2),
    expert_width=Key(name="intermediate_size", default=5632),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.router.layer.weight"),
        RouterTensor(
            name="model.layers.{i}.self_attention.experts.router.layer.weight", kind="other"
        ),
    ),
    routing=RoutingForm(score="topk_softmax"),
    parts={
        "model.layers.{i}.mlp.bias": "shared experts",
        "model.layers.{i}.self_attention.experts.bias": "attention",
        "model.layers.{i}.self_attention.experts.input_linear.weight": "experts",
        "model.layers.{i}.self_attention.experts.output_linear.weight": "experts",
    },
    read_only="its attention has as many experts as its FFN, routed apart, under one config entry",
)
