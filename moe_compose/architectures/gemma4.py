"""Gemma 4's text model: routed experts *beside* the dense FFN of every layer, each with its norms.

The router sees the normed and scaled residual; a learned scale per expert multiplies its weights.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.common import LLAMA_MLP
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import Switch
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Fill, Require, Twin

_NORM = "model.layers.{i}.%s.weight"
_HIDDEN = ((Key(name="hidden_size"),),)

_DENSE = Architecture(
    model_type="gemma4_text",
    hf_class="Gemma4ForCausalLM",
    mlp=LLAMA_MLP,
    per_layer_rope=True,
)

GEMMA4_TEXT = Architecture(
    model_type="gemma4_text",
    hf_class="Gemma4ForCausalLM",
    mlp=LLAMA_MLP,
    parallel_mlp=True,
    experts=Matrices(
        gate_up="model.layers.{i}.experts.gate_up_proj",
        down="model.layers.{i}.experts.down_proj",
    ),
    num_experts=Key(name="num_experts", default=0),
    top_k=Key(name="top_k_experts", default=0),
    expert_width=Key(name="moe_intermediate_size", default=0),
    router=(
        RouterTensor(name="model.layers.{i}.router.proj.weight"),
        RouterTensor(name="model.layers.{i}.router.per_expert_scale", kind="scale"),
        RouterTensor(name="model.layers.{i}.router.scale", kind="other"),
    ),
    routing=RoutingForm(score="softmax", renormalise=True, expert_scale=True),
    sparse=Switch(key=Key(name="enable_moe_block", default=False)),
    per_layer_rope=True,
    twins=(
        Twin(
            dense="gemma4_text",
            requires=(
                Require(
                    key=Key(name="use_double_wide_mlp", default=False),
                    allowed=(False,),
                    reason="the target's experts have one width in all layers",
                ),
            ),
            copies={
                _NORM % "pre_feedforward_layernorm": _NORM % "pre_feedforward_layernorm_2",
            },
            fills=(
                Fill(name=_NORM % "post_feedforward_layernorm_1", shape=_HIDDEN, value=1.0),
                Fill(name=_NORM % "post_feedforward_layernorm_2", shape=_HIDDEN, value=1.0),
                Fill(name="model.layers.{i}.router.scale", shape=_HIDDEN, value=1.0),
            ),
            # The FFN's output is normed once more before the norm that follows it anyway, and each
            # norm adds its epsilon.
            accuracy=1e-4,
        ),
    ),
    without_experts=_DENSE,
    parts={"model.embed_tokens_per_layer.weight": "embedding"},
    note="with use_double_wide_mlp, layers that share keys and values have FFNs of twice the width",
)
