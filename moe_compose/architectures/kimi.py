"""Kimi Linear and Bailing's hybrid (Ling, Ring): linear attention, and DeepSeek-V3's router under
config entries of their own.
"""

from dataclasses import replace

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.deepseek import (
    DEEPSEEK_ROUTER,
    DEEPSEEK_SHARED,
    DEEPSEEK_V3,
    SIGMOID_ROUTING,
)
from moe_compose.architectures.layers import FirstDense

_ROUTING = replace(
    SIGMOID_ROUTING,
    renormalise=Key(name="moe_renormalize", aliases=("norm_topk_prob",), default=True),
    top_groups=Key(name="topk_group", default=1),
)

BAILING_HYBRID = replace(
    DEEPSEEK_V3,
    model_type="bailing_hybrid",
    twins=(),
    hf_class="BailingHybridForCausalLM",
    num_experts=Key(name="num_experts", default=512),
    top_k=Key(name="num_experts_per_token", aliases=("num_experts_per_tok",), default=8),
    expert_width=Key(name="moe_intermediate_size", default=768),
    router=(
        DEEPSEEK_ROUTER[0],
        RouterTensor(
            name="model.layers.{i}.mlp.gate.expert_bias", kind="correction_bias", dtype="F32"
        ),
    ),
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=768),
        count=Key(name="num_shared_experts", aliases=("n_shared_experts",), default=1),
    ),
    routing=replace(
        _ROUTING,
        groups=Key(name="num_expert_group", aliases=("n_group",), default=8),
        top_groups=Key(name="topk_group", default=4),
    ),
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=2),
        types=Key(name="mlp_layer_types", default=None),
    ),
    embedding="model.word_embeddings.weight",
)

_KIMI_LINEAR = replace(
    DEEPSEEK_V3,
    model_type="kimi_linear",
    twins=(),
    hf_class="KimiLinearForCausalLM",
    experts=Matrices(
        gate="model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
        up="model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
        down="model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
    ),
    num_experts=Key(name="num_experts", default=256),
    top_k=Key(name="num_experts_per_token", aliases=("num_experts_per_tok",), default=8),
    expert_width=Key(name="moe_intermediate_size", default=1024),
    router=(
        RouterTensor(name="model.layers.{i}.block_sparse_moe.gate.weight"),
        RouterTensor(
            name="model.layers.{i}.block_sparse_moe.gate.e_score_correction_bias",
            kind="correction_bias",
            dtype="F32",
        ),
    ),
    shared=SharedExperts(
        matrices=Matrices(
            gate="model.layers.{i}.block_sparse_moe.shared_experts.gate_proj.weight",
            up="model.layers.{i}.block_sparse_moe.shared_experts.up_proj.weight",
            down="model.layers.{i}.block_sparse_moe.shared_experts.down_proj.weight",
        ),
        width=Key(name="moe_intermediate_size", default=1024),
        count=Key(name="num_shared_experts", aliases=("n_shared_experts",), default=1),
    ),
    routing=replace(
        _ROUTING,
        scale=Key(name="routed_scaling_factor", default=2.446),
        groups=Key(name="num_expert_group", aliases=("n_group",), default=1),
    ),
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=1),
        types=Key(name="mlp_layer_types", default=None),
    ),
    mtp=(),
)

#: As Moonshot publishes it; transformers writes dense layers under `block_sparse_moe` as well.
KIMI_LINEAR = replace(
    _KIMI_LINEAR,
    layouts=(
        replace(
            _KIMI_LINEAR,
            mlp=Matrices(
                gate="model.layers.{i}.block_sparse_moe.gate_proj.weight",
                up="model.layers.{i}.block_sparse_moe.up_proj.weight",
                down="model.layers.{i}.block_sparse_moe.down_proj.weight",
            ),
        ),
    ),
)
