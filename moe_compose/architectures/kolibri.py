"""Kolibri: a correction bias on the logits; sigmoids of the unbiased logits weigh the chosen."""

from moe_compose.architectures.base import Key, RouterTensor, SharedExperts
from moe_compose.architectures.common import QWEN_EXPERTS
from moe_compose.architectures.deepseek import DEEPSEEK_SHARED
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

KOLIBRI1 = Architecture(
    model_type="kolibri1",
    hf_class="Kolibri1ForCausalLM",
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_local_experts", aliases=("num_experts",), default=384),
    top_k=Key(name="num_experts_per_tok", default=6),
    expert_width=Key(name="moe_intermediate_size", default=512),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.gate.weight"),
        RouterTensor(
            name="model.layers.{i}.moe.router.expert_bias", kind="correction_bias", dtype="F32"
        ),
    ),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="shared_expert_intermediate_size", default=512),
    ),
    routing=RoutingForm(
        score="topk_sigmoid",
        renormalise=Key(name="norm_topk_prob", default=False),
        selection_bias=True,
    ),
)
