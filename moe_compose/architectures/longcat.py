"""LongCat-Flash: a layer is two attentions and two dense FFNs, with the experts beside them.

Some of the router's rows, after those of the experts, stand for the identity.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.common import QWEN_EXPERTS
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

LONGCAT_FLASH = Architecture(
    model_type="longcat_flash",
    hf_class="LongcatFlashForCausalLM",
    mlp=Matrices(
        gate="model.layers.{i}.mlps.0.gate_proj.weight",
        up="model.layers.{i}.mlps.0.up_proj.weight",
        down="model.layers.{i}.mlps.0.down_proj.weight",
    ),
    width=Key(name="ffn_hidden_size", default=12288),
    parallel_mlp=True,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="n_routed_experts", default=512),
    top_k=Key(name="moe_topk", default=12),
    expert_width=Key(name="expert_ffn_hidden_size", default=2048),
    zero_experts=Key(name="zero_expert_num", default=256),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.router.classifier.weight", dtype="F32"),
        RouterTensor(
            name="model.layers.{i}.mlp.router.e_score_correction_bias",
            kind="correction_bias",
            dtype="F32",
        ),
    ),
    routing=RoutingForm(
        score="softmax",
        scale=Key(name="routed_scaling_factor", default=6.0),
        selection_bias=True,
    ),
    mtp=("model.mtp.",),
    layers=Key(name="num_layers", most=10_000),
    parts={
        "model.layers.{i}.mlps.1.gate_proj.weight": "dense FFN",
        "model.layers.{i}.mlps.1.up_proj.weight": "dense FFN",
        "model.layers.{i}.mlps.1.down_proj.weight": "dense FFN",
    },
    note="active parameters are an upper bound: a token may choose the identity for an expert",
)
