"""OLMo 2 (dense), OLMoE and FlexOlmo.

FlexOlmo is OLMo 2 with experts: norms after attention and after the FFN. OLMoE has them before, so
no OLMo 2 becomes one.
"""

from moe_compose.architectures.base import Key, RouterTensor
from moe_compose.architectures.common import FULL_ROPE, LLAMA_FACTS, LLAMA_MLP, QWEN_EXPERTS
from moe_compose.architectures.family import Architecture, Portable
from moe_compose.architectures.routing_form import RoutingForm
from moe_compose.architectures.twin import Twin

_ROUTER = (RouterTensor(name="model.layers.{i}.mlp.gate.weight"),)
_ROUTING = RoutingForm(score="softmax", renormalise=Key(name="norm_topk_prob", default=False))

OLMO2 = Architecture(
    model_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    mlp=LLAMA_MLP,
    facts={
        **LLAMA_FACTS,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "attention_bias": False,
    },
)

FLEX_OLMO = Architecture(
    model_type="flex_olmo",
    hf_class="FlexOlmoForCausalLM",
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=7),
    top_k=Key(name="num_experts_per_tok", default=5),
    expert_width=Key(name="intermediate_size"),
    router=_ROUTER,
    routing=_ROUTING,
    twins=(
        Twin(
            dense="olmo2",
            config={"norm_topk_prob": True},
            unnormalised_config={"norm_topk_prob": False},
            requires=(FULL_ROPE,),
        ),
    ),
)

OLMOE = Architecture(
    model_type="olmoe",
    hf_class="OlmoeForCausalLM",
    experts=QWEN_EXPERTS,
    num_experts=Key(name="num_experts", default=64),
    top_k=Key(name="num_experts_per_tok", default=8),
    expert_width=Key(name="intermediate_size"),
    router=_ROUTER,
    routing=_ROUTING,
    portable=(
        Portable(
            key=Key(name="norm_topk_prob", default=False),
            allowed=(False,),
            breaks="vLLM, SGLang and llama.cpp silently do not renormalise",
        ),
        Portable(
            key=Key(name="clip_qkv", default=None),
            allowed=(None,),
            breaks="vLLM, SGLang and llama.cpp silently do not clip",
        ),
        Portable(
            key=Key(name="rms_norm_eps", default=1e-5),
            allowed=(1e-5,),
            breaks="vLLM and SGLang silently use 1e-5",
        ),
        Portable(
            key=Key(name="tie_word_embeddings", default=False),
            allowed=(False,),
            breaks="vLLM, SGLang and llama.cpp expect an output projection of its own",
        ),
    ),
    note="no dense family has its pre-norm blocks with full-width q and k norms",
)
