"""Mellum: Qwen3-MoE with a sliding window in some layers and rope parameters per layer type.

A list says which layers are sparse.
"""

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures.base import Computed, Key, RouterTensor
from moe_compose.architectures.common import FULL_ROPE, LLAMA_MLP, QWEN_EXPERTS
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import TypeList
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin


def _attention_types(config: Mapping[str, Any]) -> list[str]:
    """Qwen3's: a window, if in use, from layer `max_window_layers` on."""
    count = Key(name="num_hidden_layers").integer(config)
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    stated = config.get("layer_types")
    if not windowed:
        return ["full_attention"] * count
    if stated is not None:
        return list(stated)
    first = int(config.get("max_window_layers", 28))
    return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]


def _same_rope_everywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {kind: dict(rope) for kind in ("full_attention", "sliding_attention")}


MELLUM = Architecture(
    model_type="mellum",
    hf_class="MellumForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_local_experts", aliases=("num_experts",), default=64),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="moe_intermediate_size", default=896),
    router=(RouterTensor(name="model.layers.{i}.mlp.gate.weight"),),
    routing=RoutingForm(score="softmax", renormalise=Key(name="norm_topk_prob", default=True)),
    sparse=TypeList(key=Key(name="mlp_layer_types", default=None)),
    mtp=("mtp.",),
    per_layer_rope=True,
    twins=(
        Twin(
            dense="qwen3",
            config={
                "norm_topk_prob": True,
                "layer_types": Computed(name="layer_types", formula=_attention_types),
                "rope_parameters": Computed(name="rope_parameters", formula=_same_rope_everywhere),
            },
            unnormalised_config={"norm_topk_prob": False},
            drop=("rope_theta", "rope_scaling", "use_sliding_window", "max_window_layers"),
            requires=(FULL_ROPE,),
        ),
    ),
)
