"""Llama 4's text model: experts stacked and transposed, a shared expert in every sparse layer.

The sigmoid of a chosen logit multiplies the expert's *input*. Dense layers have their own width.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import StepOrList
from moe_compose.architectures.routing_form import RoutingForm

LLAMA4_TEXT = Architecture(
    model_type="llama4_text",
    hf_class="Llama4ForCausalLM",
    mlp=Matrices(
        gate="model.layers.{i}.feed_forward.gate_proj.weight",
        up="model.layers.{i}.feed_forward.up_proj.weight",
        down="model.layers.{i}.feed_forward.down_proj.weight",
    ),
    width=Key(name="intermediate_size_mlp", default=16384),
    experts=Matrices(
        gate_up="model.layers.{i}.feed_forward.experts.gate_up_proj",
        down="model.layers.{i}.feed_forward.experts.down_proj",
        transposed=True,
    ),
    num_experts=Key(name="num_local_experts", default=16),
    top_k=Key(name="num_experts_per_tok", default=1),
    expert_width=Key(name="intermediate_size", default=8192),
    router=(RouterTensor(name="model.layers.{i}.feed_forward.router.weight"),),
    shared=SharedExperts(
        matrices=Matrices(
            gate="model.layers.{i}.feed_forward.shared_expert.gate_proj.weight",
            up="model.layers.{i}.feed_forward.shared_expert.up_proj.weight",
            down="model.layers.{i}.feed_forward.shared_expert.down_proj.weight",
        ),
        width=Key(name="intermediate_size", default=8192),
    ),
    routing=RoutingForm(score="topk_sigmoid", applied_to="input"),
    sparse=StepOrList(
        layers_key=Key(name="moe_layers", default=None),
        step=Key(name="interleave_moe_layer_step", default=1),
    ),
)
