"""What looks like a pair and is not: dense families that no MoE family computes, MoE families that
no dense family grows into, and pairs of which each has other partners. All with what differs.
"""

from collections.abc import Mapping
from itertools import product

_SANDWICH = "its blocks have norms after attention and FFN as well as before"
_LAYER_NORM = "its norms subtract the mean, and its FFN has biases and no gate"
_PARALLEL = "attention and FFN stand side by side in a block"

#: Dense families without any exact target → what no MoE family has.
NO_TARGET: Mapping[str, str] = {
    "apertus": "its FFN has no gate (xIELU)",
    "arcee": "its FFN has no gate (squared ReLU)",
    "bloom": f"ALiBi positions; {_LAYER_NORM}",
    "cohere": "it rotates queries and keys in all layers, Cohere 2 MoE only in those with a window",
    "exaone4": "its norms follow attention and FFN, and queries and keys are normed head by head",
    "falcon": f"{_PARALLEL}; {_LAYER_NORM}",
    "gemma": "its norm weights are offsets from 1, and its embedding is scaled",
    "gemma2": f"{_SANDWICH}, norm weights are offsets from 1, and attention scores are soft-capped",
    "gemma3": f"{_SANDWICH}, and norm weights are offsets from 1",
    "gemma3_text": f"{_SANDWICH}, and norm weights are offsets from 1",
    "gemma3n": "its blocks mix several residual streams",
    "gemma3n_text": "its blocks mix several residual streams",
    "glm": "it rotates a part of each head, in interleaved pairs",
    "glm4": f"{_SANDWICH}, and it rotates a part of each head, in interleaved pairs",
    "gpt2": f"learned positions; {_LAYER_NORM}",
    "gpt_neox": f"{_PARALLEL}; {_LAYER_NORM}",
    "gptj": f"{_PARALLEL}; {_LAYER_NORM}",
    "jais2": _LAYER_NORM,
    "mamba": "it has no FFN to make experts of",
    "mamba2": "it has no FFN to make experts of",
    "mpt": "ALiBi positions, and an FFN without a gate",
    "nemotron": "its norms subtract the mean, and its FFN has no gate (squared ReLU)",
    "olmo": "its norms subtract the mean and have no weights",
    "olmo3": "some layers have a sliding window; FlexOlmo, otherwise the same, has full attention",
    "opt": f"learned positions; {_LAYER_NORM}",
    "phi": f"{_PARALLEL}; {_LAYER_NORM}",
    "smollm3": "some layers have no rotary embedding",
    "stablelm": "its norms subtract the mean, and it rotates a part of each head",
    "starcoder2": _LAYER_NORM,
}

#: MoE families that no dense family grows into → what no dense family has.
NO_SOURCE: Mapping[str, str] = {
    "dbrx": "its norms subtract the mean, and queries, keys and values are clipped",
    "gpt_oss": "its experts clamp their activations, and its attention has sinks",
    "jamba": "most of its layers are Mamba, and its weights are never renormalised",
    "llama4_text": "routing weights scale an expert's input, and the expert is not linear in it",
    "minimax": "some layers have lightning attention",
    "minimax_m2": "its norms come before attention and FFN, with queries and keys normed over all "
    "heads at once",
    "nemotron_h": "a layer is attention, Mamba or experts alone, and experts have no gate",
    "olmoe": "its norms come before attention and FFN, with queries and keys normed over all heads "
    "at once; OLMo 2 becomes flex_olmo",
    "phimoe": "its two weights come from two separate softmaxes and never sum to 1, and its norms "
    "subtract the mean",
    "qwen3_next": "most layers have gated delta-rule attention",
}

_FULL_HEADS = (
    *("llama", "mistral", "phi3", "qwen2", "qwen3", "olmo2", "granite", "seed_oss", "ernie4_5"),
    *("hunyuan_v1_dense", "cohere2"),
)
_LATENT = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "glm4_moe_lite"),
    *("glm_moe_dsa", "axk1", "kimi_linear", "bailing_hybrid", "longcat_flash"),
)

#: `(dense, target)` → what the two compute differently.
NO_PAIR: Mapping[tuple[str, str], str] = {
    ("cohere2", "mixtral"): "Cohere's norms subtract the mean, and attention and FFN stand side by "
    "side in a block",
    ("ernie4_5", "mixtral"): "ERNIE interleaves rotary pairs, Mixtral splits heads in halves",
    ("granite", "mixtral"): "Mixtral has none of Granite's multipliers",
    ("hunyuan_v1_dense", "qwen3_moe"): "HunYuan norms queries and keys after rotating them, "
    "Qwen3 before",
    ("llama", "dots1"): "dots.llm1 norms queries and keys",
    ("llama", "flex_olmo"): "FlexOlmo has its norms after attention and FFN, and norms queries "
    "and keys",
    ("llama", "hunyuan_v1_moe"): "HunYuan norms queries and keys",
    ("llama", "qwen3_moe"): "Qwen3 norms queries and keys",
    ("mistral", "qwen3_moe"): "Qwen3 norms queries and keys",
    (
        "olmo2",
        "mixtral",
    ): "OLMo 2 has its norms after attention and FFN, and norms queries and keys",
    ("qwen2", "mixtral"): "Mixtral has no biases on queries, keys and values",
    ("qwen2", "qwen3_moe"): "Qwen3 norms queries and keys and has no biases on them",
    ("qwen3", "granitemoe"): "GraniteMoE does not norm queries and keys",
    ("qwen3", "hunyuan_v1_moe"): "HunYuan norms queries and keys after rotating them, Qwen3 before",
    ("qwen3", "mixtral"): "Mixtral does not norm queries and keys",
    ("qwen3", "qwen2_moe"): "Qwen2-MoE does not norm queries and keys",
    **dict.fromkeys(
        product(_FULL_HEADS, _LATENT),
        "the target's attention compresses keys and values (MLA), the source's does not",
    ),
}


def why_not(dense: str, target: str) -> str:
    """Why a dense checkpoint of family `dense` does not become one of family `target`."""
    found = NO_PAIR.get((dense, target)) or NO_SOURCE.get(target)
    return found or "the two compute different things around the FFN"
