"""Nemotron-H: a layer is Mamba, attention, an FFN or experts, never two of them.

FFNs are not gated (`W_d relu(W_u x)²`); experts may work in a latent space narrower than the model.
"""

from dataclasses import replace

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.deepseek import SIGMOID_ROUTING
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import Blocks

NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    hf_class="NemotronHForCausalLM",
    mlp=Matrices(
        up="backbone.layers.{i}.mixer.up_proj.weight",
        down="backbone.layers.{i}.mixer.down_proj.weight",
    ),
    width=Key(name="intermediate_size", default=21504),
    experts=Matrices(
        up="backbone.layers.{i}.mixer.experts.{e}.up_proj.weight",
        down="backbone.layers.{i}.mixer.experts.{e}.down_proj.weight",
    ),
    num_experts=Key(name="n_routed_experts", default=8),
    top_k=Key(name="num_experts_per_tok", default=2),
    expert_width=Key(name="moe_intermediate_size", default=7688),
    expert_hidden=Key(name="moe_latent_size", default=None),
    router=(
        RouterTensor(name="backbone.layers.{i}.mixer.gate.weight"),
        RouterTensor(
            name="backbone.layers.{i}.mixer.gate.e_score_correction_bias",
            kind="correction_bias",
            dtype="F32",
        ),
    ),
    shared=SharedExperts(
        matrices=Matrices(
            up="backbone.layers.{i}.mixer.shared_experts.up_proj.weight",
            down="backbone.layers.{i}.mixer.shared_experts.down_proj.weight",
        ),
        width=Key(name="moe_shared_expert_intermediate_size", default=7688),
    ),
    routing=replace(SIGMOID_ROUTING, scale=Key(name="routed_scaling_factor", default=1.0)),
    sparse=Blocks(
        key=Key(name="layers_block_type", aliases=("hybrid_override_pattern",)),
        moe=("moe", "E"),
    ),
    mtp=("mtp.",),
    embedding="backbone.embeddings.weight",
    layers=Key(name="layers_block_type", aliases=("hybrid_override_pattern",), count_of=""),
    parts={
        "backbone.layers.{i}.mixer.fc1_latent_proj.weight": "shared experts",
        "backbone.layers.{i}.mixer.fc2_latent_proj.weight": "shared experts",
    },
)
