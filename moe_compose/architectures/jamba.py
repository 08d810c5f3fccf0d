"""Jamba: Mamba and attention layers, every other FFN sparse; weights are never renormalised."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import Period
from moe_compose.architectures.routing_form import RoutingForm

_COUNT = Key(name="num_experts", default=16)

JAMBA = Architecture(
    model_type="jamba",
    hf_class="JambaForCausalLM",
    mlp=Matrices(
        gate="model.layers.{i}.feed_forward.gate_proj.weight",
        up="model.layers.{i}.feed_forward.up_proj.weight",
        down="model.layers.{i}.feed_forward.down_proj.weight",
    ),
    experts=Matrices(
        gate="model.layers.{i}.feed_forward.experts.{e}.gate_proj.weight",
        up="model.layers.{i}.feed_forward.experts.{e}.up_proj.weight",
        down="model.layers.{i}.feed_forward.experts.{e}.down_proj.weight",
    ),
    num_experts=_COUNT,
    top_k=Key(name="num_experts_per_tok", default=2),
    expert_width=Key(name="intermediate_size", default=14336),
    router=(RouterTensor(name="model.layers.{i}.feed_forward.router.weight"),),
    routing=RoutingForm(score="softmax"),
    sparse=Period(
        period=Key(name="expert_layer_period", default=2),
        offset=Key(name="expert_layer_offset", default=1),
        experts=_COUNT,
    ),
)
