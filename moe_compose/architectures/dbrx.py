"""DBRX: experts stacked along rows, `[E·F, D]` for all three matrices; config entries nested."""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

DBRX = Architecture(
    model_type="dbrx",
    hf_class="DbrxForCausalLM",
    experts=Matrices(
        gate="transformer.blocks.{i}.ffn.experts.mlp.w1",
        up="transformer.blocks.{i}.ffn.experts.mlp.v1",
        down="transformer.blocks.{i}.ffn.experts.mlp.w2",
        flat=True,
    ),
    num_experts=Key(name="ffn_config.moe_num_experts", default=4),
    top_k=Key(name="ffn_config.moe_top_k", default=1),
    expert_width=Key(name="ffn_config.ffn_hidden_size", default=3584),
    router=(RouterTensor(name="transformer.blocks.{i}.ffn.router.layer.weight"),),
    routing=RoutingForm(
        score="softmax",
        renormalise=True,
        norm_p=Key(name="ffn_config.moe_normalize_expert_weights", default=1.0),
    ),
    embedding="transformer.wte.weight",
    hidden=Key(name="d_model"),
    layers=Key(name="n_layers", most=10_000),
    note="a null moe_normalize_expert_weights is read as 1; transformers would not normalise",
)
