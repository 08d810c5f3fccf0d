"""DeepSeek V2 to V4, and the router that half of the field has taken from V3.

V2 scores by softmax and picks groups by their best expert. V3 scores by sigmoid, adds a correction
bias for choosing only (aux-loss-free balancing, 2408.15664), picks groups by their best two, and
scales the renormalised weights. V4 has neither groups nor dense layers; its first layers route by a
table of token ids.
"""

from dataclasses import replace

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.common import LLAMA_FACTS, LLAMA_MLP, QWEN_EXPERTS, key_value_heads
from moe_compose.architectures.family import Architecture
from moe_compose.architectures.layers import FirstDense
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

DEEPSEEK_SHARED = Matrices(
    gate="model.layers.{i}.mlp.shared_experts.gate_proj.weight",
    up="model.layers.{i}.mlp.shared_experts.up_proj.weight",
    down="model.layers.{i}.mlp.shared_experts.down_proj.weight",
)
DEEPSEEK_ROUTER = (
    RouterTensor(name="model.layers.{i}.mlp.gate.weight"),
    RouterTensor(
        name="model.layers.{i}.mlp.gate.e_score_correction_bias",
        kind="correction_bias",
        dtype="F32",
    ),
)
#: The multi-token-prediction layers follow the decoder layers under the same name.
MTP_LAYERS = ("model.layers.{n}.",)


#: V3's scheme; families replace what their config class has other defaults for.
SIGMOID_ROUTING = RoutingForm(
    score="sigmoid",
    renormalise=Key(name="norm_topk_prob", default=True),
    epsilon=1e-20,
    scale=Key(name="routed_scaling_factor", default=2.5),
    selection_bias=True,
    groups=Key(name="n_group", default=1),
    top_groups=Key(name="topk_group", default=1),
)

#: Settings under which V3's router gives weights that sum to 1, over all experts.
WEIGHTS_SUM_TO_1 = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}

#: Tencent's Youtu-LLM: DeepSeek-V3's attention in a dense model.
YOUTU = Architecture(
    model_type="youtu",
    hf_class="YoutuForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "num_key_value_heads": key_value_heads(16),
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
        "rope_interleave": True,
        "attention_bias": False,
    },
)

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    hf_class="DeepseekV2ForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="n_routed_experts", default=64),
    top_k=Key(name="num_experts_per_tok"),
    expert_width=Key(name="moe_intermediate_size", default=1407),
    router=DEEPSEEK_ROUTER[:1],
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=1407),
        count=Key(name="n_shared_experts", default=2),
    ),
    routing=RoutingForm(
        score="softmax",
        scale=Key(name="routed_scaling_factor", default=1.0),
        groups=Key(name="n_group", default=1),
        top_groups=Key(name="topk_group", default=1),
        group_score=Key(
            name="topk_method",
            default="greedy",
            values={"greedy": "none", "group_limited_greedy": "max"},
        ),
    ),
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=0),
        frequency=Key(name="moe_layer_freq", default=1),
    ),
    note="norm_topk_prob is ignored by transformers; every published checkpoint has it false",
)

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    hf_class="DeepseekV3ForCausalLM",
    mlp=LLAMA_MLP,
    experts=QWEN_EXPERTS,
    num_experts=Key(name="n_routed_experts", default=256),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="moe_intermediate_size", default=2048),
    router=DEEPSEEK_ROUTER,
    shared=SharedExperts(
        matrices=DEEPSEEK_SHARED,
        width=Key(name="moe_intermediate_size", default=2048),
        count=Key(name="n_shared_experts", default=1),
    ),
    routing=replace(
        SIGMOID_ROUTING,
        groups=Key(name="n_group", default=8),
        top_groups=Key(name="topk_group", default=4),
    ),
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=3),
        frequency=Key(name="moe_layer_freq", default=1),
    ),
    mtp=MTP_LAYERS,
    spelled={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    twins=(Twin(dense="youtu", config={**WEIGHTS_SUM_TO_1, "num_nextn_predict_layers": 0}),),
)

KIMI_K2 = replace(
    DEEPSEEK_V3,
    model_type="kimi_k2",
    twins=(),
    note="a DeepSeek-V3 under another name; transformers loads it with Moonshot's own config class",
)

DEEPSEEK_V32 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v32",
    twins=(),
    hf_class="DeepseekV32ForCausalLM",
    sparse=FirstDense(
        key=Key(name="first_k_dense_replace", default=3),
        types=Key(name="mlp_layer_types", default=None),
    ),
)

#: As DeepSeek publishes it.
_V4 = Architecture(
    model_type="deepseek_v4",
    hf_class="DeepseekV4ForCausalLM",
    experts=Matrices(
        gate="layers.{i}.ffn.experts.{e}.w1.weight",
        up="layers.{i}.ffn.experts.{e}.w3.weight",
        down="layers.{i}.ffn.experts.{e}.w2.weight",
    ),
    num_experts=Key(name="n_routed_experts", default=256),
    top_k=Key(name="num_experts_per_tok", default=6),
    expert_width=Key(name="moe_intermediate_size", default=2048),
    router=(
        RouterTensor(name="layers.{i}.ffn.gate.weight"),
        RouterTensor(
            name="layers.{i}.ffn.gate.bias", kind="correction_bias", dtype="F32", optional=True
        ),
        RouterTensor(name="layers.{i}.ffn.gate.tid2eid", kind="table", dtype="I64", optional=True),
    ),
    shared=SharedExperts(
        matrices=Matrices(
            gate="layers.{i}.ffn.shared_experts.w1.weight",
            up="layers.{i}.ffn.shared_experts.w3.weight",
            down="layers.{i}.ffn.shared_experts.w2.weight",
        ),
        width=Key(name="moe_intermediate_size", default=2048),
        count=Key(name="n_shared_experts", default=1),
    ),
    routing=RoutingForm(
        score=Key(
            name="scoring_func",
            default="sqrtsoftplus",
            values={"sqrtsoftplus": "sqrtsoftplus", "sigmoid": "sigmoid"},
        ),
        renormalise=True,
        epsilon=1e-20,
        scale=Key(name="routed_scaling_factor", default=1.5),
        selection_bias=True,
        hashed_layers=Key(
            name="mlp_layer_types", aliases=("num_hash_layers",), default=3, count_of="hash_moe"
        ),
    ),
    mtp=("mtp.", "model.mtp."),
    embedding="embed.weight",
    head="head.weight",
    per_layer_rope=True,
    usual_counts="the family's own kernels, in vLLM and SGLang",
    note="layers that route by token id have gate.tid2eid in place of gate.bias: a table of expert "
    "ids, to be rewritten when experts move",
)

#: transformers writes the same names behind `model.`, except the head's.
DEEPSEEK_V4 = replace(
    _V4, layouts=(_V4.renamed({"layers.": "model.layers.", "embed.": "model.embed_tokens."}),)
)
