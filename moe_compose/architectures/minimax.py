"""MiniMax: Mixtral's experts, around lightning attention; then with a sigmoid router (M2)."""

from dataclasses import replace

from moe_compose.architectures.base import Key, RouterTensor
from moe_compose.architectures.mixtral import MIXTRAL
from moe_compose.architectures.routing_form import RoutingForm

MINIMAX = replace(
    MIXTRAL,
    model_type="minimax",
    hf_class="MiniMaxForCausalLM",
    expert_width=Key(name="intermediate_size", default=14336),
    portable=(),
    twins=(),
)

MINIMAX_M2 = replace(
    MIXTRAL,
    model_type="minimax_m2",
    hf_class="MiniMaxM2ForCausalLM",
    num_experts=Key(name="num_local_experts", default=256),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="intermediate_size", default=1536),
    router=(
        *MIXTRAL.router,
        RouterTensor(
            name="model.layers.{i}.block_sparse_moe.e_score_correction_bias",
            kind="correction_bias",
            dtype="F32",
        ),
    ),
    routing=RoutingForm(score="sigmoid", renormalise=True, selection_bias=True),
    portable=(),
    twins=(),
)
