"""ZAYA: the router is a small MLP that also hears the router of the layer before.

The last of its classes skips the FFN altogether.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

_GATE = "model.layers.{i}.mlp.gate."

ZAYA = Architecture(
    model_type="zaya",
    hf_class="ZayaForCausalLM",
    experts=Matrices(
        gate_up="model.layers.{i}.mlp.experts.gate_up_proj",
        down="model.layers.{i}.mlp.experts.down_proj",
    ),
    num_experts=Key(name="num_experts", default=16),
    top_k=Key(name="num_experts_per_tok", default=1),
    expert_width=Key(name="moe_intermediate_size", default=2048),
    zero_experts=1,
    router=(
        RouterTensor(
            name=_GATE + "router_mlp.out_proj.weight",
            width=Key(name="router_hidden_size", default=256),
        ),
        RouterTensor(name=_GATE + "balancing_biases", kind="correction_bias", dtype="F32"),
        RouterTensor(name=_GATE + "down_proj.weight", kind="other"),
        RouterTensor(name=_GATE + "down_proj.bias", kind="other"),
        RouterTensor(name=_GATE + "router_mlp.norm.weight", kind="other"),
        RouterTensor(name=_GATE + "router_mlp.fc1.weight", kind="other"),
        RouterTensor(name=_GATE + "router_mlp.fc1.bias", kind="other"),
        RouterTensor(name=_GATE + "router_mlp.fc2.weight", kind="other"),
        RouterTensor(name=_GATE + "router_mlp.fc2.bias", kind="other"),
        RouterTensor(name=_GATE + "router_states_scale", kind="other", optional=True),
    ),
    routing=RoutingForm(score="softmax", selection_bias=True),
    per_layer_rope=True,
    note="its logits come from an MLP and the layer before, not from one matrix: routing cannot be "
    "recomputed from the weight alone",
)
