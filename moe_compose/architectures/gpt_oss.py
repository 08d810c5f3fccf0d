"""gpt-oss: experts stacked, transposed, with biases, gate and up interleaved; a bias in the logits.

On the Hub the experts are MXFP4: `gate_up_proj_blocks [E, 2F, D/32, 16]` and `_scales`, not
transposed. Their activation is a clamped SwiGLU with `up + 1`: no other FFN becomes one of them.
"""

from moe_compose.architectures.base import Key, Matrices, RouterTensor
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.routing_form import RoutingForm

GPT_OSS = Architecture(
    model_type="gpt_oss",
    hf_class="GptOssForCausalLM",
    experts=Matrices(
        gate_up="model.layers.{i}.mlp.experts.gate_up_proj",
        down="model.layers.{i}.mlp.experts.down_proj",
        transposed=True,
        interleaved=True,
        biases=(
            "model.layers.{i}.mlp.experts.gate_up_proj_bias",
            "model.layers.{i}.mlp.experts.down_proj_bias",
        ),
    ),
    num_experts=Key(name="num_local_experts", default=128),
    top_k=Key(name="num_experts_per_tok", default=4),
    expert_width=Key(name="intermediate_size", default=2880),
    router=(
        RouterTensor(name="model.layers.{i}.mlp.router.weight"),
        RouterTensor(name="model.layers.{i}.mlp.router.bias", kind="bias"),
    ),
    routing=RoutingForm(score="topk_softmax", logit_bias=True),
)
