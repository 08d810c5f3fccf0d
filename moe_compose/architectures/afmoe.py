"""Arcee's AFMoE (Trinity): sigmoid scores and a correction bias, around gated window attention."""

from moe_compose.architectures.base import Key, RouterTensor, SharedExperts
from moe_compose.architectures.common import LLAMA_MLP, QWEN_EXPERTS
from moe_compose.architectures.deepseek import DEEPSEEK_SHARED
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import FirstDense
from moe_compose.architectures.routing_form import RoutingForm

AFMOE = Architecture(
    model_type="afmoe",
    hf_class="AfmoeForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=64),
    top_k=Key(name="num_experts_per_tok", default=6),
    expert_width=Key(name="moe_intermediate_size", default=1408),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.router.gate.weight"),
        RouterTensor(name="model.layers.{i}.mlp.expert_bias", kind="correction_bias", dtype="F32"),
    ),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1408),
        count=Key(name="num_shared_experts", default=2),
    ),
    routing=RoutingForm(
        score="sigmoid",
        renormalise=True,
        epsilon=1e-20,
        scale=Key(name="route_scale", default=1.0),
        selection_bias=True,
    ),
    sparse=FirstDense(key=Key(name="num_dense_layers", default=1)),
)
