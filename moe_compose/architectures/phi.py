"""Phi-3, which is Llama with fused projections, and Phi-3.5-MoE, Mixtral with another router.

Its two weights never sum to 1: each is a probability of a softmax of its own (2409.12136).
"""

from dataclasses import replace

from moe_compose.architectures.base import Key, Matrices
from moe_compose.architectures.common import HEAD_DIM, LLAMA_FACTS
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.mixtral import MIXTRAL
from moe_compose.architectures.routing_form import RoutingForm

#: Llama with fused projections; the larger ones rotate a part of each head only.
PHI3 = Architecture(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    mlp=Matrices(
        gate_up="model.layers.{i}.mlp.gate_up_proj.weight",
        down="model.layers.{i}.mlp.down_proj.weight",
    ),
    facts={
        **LLAMA_FACTS,
        "rms_norm_eps": 1e-5,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "sliding_window": None,
    },
)

PHIMOE = replace(
    MIXTRAL,
    model_type="phimoe",
    hf_class="PhimoeForCausalLM",
    num_experts=Key(name="num_local_experts", default=16),
    expert_width=Key(name="intermediate_size", default=6400),
    routing=RoutingForm(score="sparsemixer", jitter=Key(name="router_jitter_noise", default=0.01)),
    portable=(),
    twins=(),
)
