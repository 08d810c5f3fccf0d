"""Granite, dense and MoE: experts stacked in two tensors, the router behind one more module, four
multipliers.

The dense members of the hybrid family are `granitemoehybrid` checkpoints with zero experts and
everything in the shared MLP.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.common import (
    ATTENTION_SCALE,
    FULL_ATTENTION,
    FULL_ROPE,
    LLAMA_FACTS,
    LLAMA_MLP,
    NO_MLP_BIAS,
    NO_WINDOW,
    WHOLE_HEADS,
)
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import Switch
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Fill, Twin

_EXPERTS = Matrices(
    gate_up="model.layers.{i}.block_sparse_moe.input_linear.weight",
    down="model.layers.{i}.block_sparse_moe.output_linear.weight",
)
_SHARED = Matrices(
    gate_up="model.layers.{i}.shared_mlp.input_linear.weight",
    down="model.layers.{i}.shared_mlp.output_linear.weight",
)
_ROUTER = (RouterTensor(name="model.layers.{i}.block_sparse_moe.router.layer.weight"),)
_COUNT = Key(name="num_local_experts", default=8)
_TOP_K = Key(name="num_experts_per_tok", default=2)
_WIDTH = Key(name="intermediate_size")

GRANITE_FACTS = {
    **LLAMA_FACTS,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}

GRANITE = Architecture(
    model_type="granite",
    hf_class="GraniteForCausalLM",
    mlp=LLAMA_MLP,
    facts={**GRANITE_FACTS, "mlp_bias": False},
)

_GRANITE_TWIN = Twin(
    dense="granite", drop=("mlp_bias",), requires=(NO_MLP_BIAS, FULL_ROPE, WHOLE_HEADS)
)

#: Granite's attention is Qwen2's with a scale of its own and, if it has biases, one more.
_QWEN2_TWIN = Twin(
    dense="qwen2",
    config={
        "attention_bias": True,
        "attention_multiplier": ATTENTION_SCALE,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    drop=("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
    requires=(NO_WINDOW, FULL_ATTENTION, FULL_ROPE, WHOLE_HEADS),
    fills=(
        Fill(name="model.layers.{i}.self_attn.o_proj.bias", shape=((Key(name="hidden_size"),),)),
    ),
)

GRANITEMOE = Architecture(
    model_type="granitemoe",
    hf_class="GraniteMoeForCausalLM",
    experts=_EXPERTS,
    num_experts=_COUNT,
    top_k=_TOP_K,
    expert_width=_WIDTH,
    router=_ROUTER,
    routing=RoutingForm(score="topk_softmax"),
    facts=GRANITE_FACTS,
    twins=(_GRANITE_TWIN, _QWEN2_TWIN),
)

GRANITEMOESHARED = Architecture(
    model_type="granitemoeshared",
    hf_class="GraniteMoeSharedForCausalLM",
    experts=_EXPERTS,
    num_experts=_COUNT,
    top_k=_TOP_K,
    expert_width=_WIDTH,
    router=_ROUTER,
    shared=SharedExperts(
        matrices=_SHARED,
        width=Key(name="shared_intermediate_size", default=0),
        optional=True,
    ),
    routing=RoutingForm(score="topk_softmax"),
    facts=GRANITE_FACTS,
    twins=(_GRANITE_TWIN,),
)

_HYBRID_WIDTH = Key(name="shared_intermediate_size", default=1024)

GRANITEMOEHYBRID = Architecture(
    model_type="granitemoehybrid",
    hf_class="GraniteMoeHybridForCausalLM",
    experts=_EXPERTS,
    num_experts=_COUNT,
    top_k=_TOP_K,
    expert_width=_WIDTH,
    router=_ROUTER,
    shared=SharedExperts(
        matrices=_SHARED,
        width=_HYBRID_WIDTH,
    ),
    routing=RoutingForm(score="topk_softmax"),
    sparse=Switch(key=_COUNT),
    facts=GRANITE_FACTS,
    twins=(Twin(dense="granitemoehybrid"),),
    without_experts=Architecture(
        model_type="granitemoehybrid",
        hf_class="GraniteMoeHybridForCausalLM",
        mlp=_SHARED,
        width=_HYBRID_WIDTH,
    ),
    note="with num_local_experts = 0 a dense model whose FFN is the shared MLP",
)

GRANITEMOE_SWA = Architecture(
    model_type="granitemoe_swa",
    hf_class="GraniteMoeSWAForCausalLM",
    experts=Matrices(
        gate_up="model.layers.{i}.block_sparse_moe.experts.gate_up_proj",
        down="model.layers.{i}.block_sparse_moe.experts.down_proj",
    ),
    num_experts=_COUNT,
    top_k=_TOP_K,
    expert_width=_WIDTH,
    router=(RouterTensor(name="model.layers.{i}.block_sparse_moe.router.weight"),),
    shared=SharedExperts(
        matrices=_SHARED,
        width=Key(name="shared_intermediate_size", default=0),
        optional=True,
    ),
    routing=RoutingForm(score="topk_softmax"),
)
