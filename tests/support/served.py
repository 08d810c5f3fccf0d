"""Results of every operation for every family that engines were seen to compute exactly.

The sources look trained, and nothing in their configs is what an engine would assume: head × 5, no
norm of ones, biases, sinks, routers that decide, a rope theta of no family; sizes that engines'
kernels take; a tokenizer. Otherwise an engine's fault passes unnoticed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dense_models import in_old_dialect
from merged import measured
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import moe_compose as mc

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "tests/serving/environments.sh"
#: Where `environments.sh` builds.
ENVIRONMENTS = Path(os.environ.get("MOE_COMPOSE_SERVING", ROOT / ".venvs/serving"))

#: Engine → the worker's word for it, and its environment; mlx-lm is installed beside us.
ENGINES = {
    "transformers 4": ("transformers", "transformers4"),
    "vLLM": ("vllm", "vllm"),
    "llama.cpp": ("llama.cpp", "llama_cpp"),
    "mlx-lm": ("mlx-lm", ""),
}
PROMPTS = [[(7 * i * i + 13 * j + 5) % 380 + 3 for i in range(20)] for j in range(3)]
NEW_TOKENS = 12

#: Largest difference of two logprobs that is rounding, in nats.
TOLERANCE = 5e-5

#: Engine → families that it does not read.
UNREAD = {"llama.cpp": {"flex_olmo"}, "mlx-lm": {"flex_olmo", "gpt_oss"}}

#: Case → engines that compute something else, as the portable profile says.
WRONG = {"compose qwen2_moe": {"llama.cpp", "mlx-lm"}}

SAMPLE = Path(mc.__file__).with_name("validation") / "sample.txt"
VOCABULARY = 384
THETA = 50000.0

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}
#: vLLM's latent attention on a CPU knows these sizes only.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
QWEN: dict[str, Any] = {**EXPERTS, "moe_intermediate_size": 64}
DEEPSEEK: dict[str, Any] = {
    **LATENT,
    "rms_norm_eps": 3e-6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "num_hidden_layers": 3,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": True, "original_max_position_embeddings": 64,
}  # fmt: skip

#: MoE sources: `model_type` and what its config says beside `SIZES`.
MOES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 3e-6},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 96, "norm_topk_prob": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**EXPERTS, "num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v3 in groups": ("deepseek_v3", {**DEEPSEEK, "n_group": 2, "topk_group": 1}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 64,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": YARN,
        },
    ),
    "flex_olmo": ("flex_olmo", {**EXPERTS, "norm_topk_prob": True}),
}
#: Target → the dense family it grows from, and what its config says.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("llama", {"head_dim": 32, "rms_norm_eps": 3e-6}),
    "qwen2_moe": ("qwen2", {"rms_norm_eps": 3e-6}),
    "qwen3_moe": ("qwen3", {"head_dim": 32, "rms_norm_eps": 3e-6}),
    "deepseek_v3": ("youtu", {**LATENT, "rms_norm_eps": 3e-6}),
    "flex_olmo": ("olmo2", {}),
}
#: What configs on the Hub say and transformers 5 leaves out when it saves.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
        "moe_layer_freq": 1, "ep_size": 1,
    },
    "qwen3_moe": {"num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
}  # fmt: skip

CASES = [(op, family) for op in ("upcycle", "compose") for family in DENSE] + [
    (op, family)
    for op in ("add-expert", "prune", "merge")
    for family in MOES
    if family != "deepseek_v3 in groups"
]


@torch.no_grad()
def look_trained(model: torch.nn.Module, seed: int) -> None:
    """Redraw all weights, so that every part of a block matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        drawn = torch.randn(p.shape, generator=generator)
        if "inv_freq" in name:
            continue
        if "correction_bias" in name:
            p.copy_(drawn.abs() / 8)  # below zero, transformers 4 chooses outside its groups
        elif "norm" in name:
            p.copy_(1 + 0.3 * drawn)
        elif p.ndim == 1 or name.endswith("bias"):
            p.copy_(0.3 * drawn)
        elif "embed" in name:
            p.copy_(drawn)
        else:
            p.copy_((2.0 if "lm_head" in name else 1.5) * drawn / p.shape[-1] ** 0.5)


def tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCABULARY` tokens, saved under the portable class name."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(SAMPLE)], trainer)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def source(folder: Path, model_type: str, stated: dict[str, Any], seed: int = 0) -> mc.Checkpoint:
    """A model as its makers would publish it."""
    if folder.exists():
        return mc.Checkpoint.open(folder)
    config = AutoConfig.for_model(model_type, **{**SIZES, **stated})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    look_trained(model, seed)
    model.save_pretrained(folder)
    tokenizer(folder)
    path = folder / "config.json"
    config = in_old_dialect(json.loads(path.read_text())) | PUBLISHED.get(model_type, {})
    path.write_text(json.dumps(config, indent=2))
    return mc.Checkpoint.open(folder)


def dense(folder: Path, family: str, seed: int = 0) -> mc.Checkpoint:
    model_type, stated = DENSE[family]
    return source(folder / f"dense {family} {seed}", model_type, stated, seed)


def moe(folder: Path, family: str, seed: int = 0) -> mc.Checkpoint:
    model_type, stated = MOES[family]
    return source(folder / f"moe {family} {seed}", model_type, stated, seed)


def upcycled(folder: Path, family: str) -> Any:
    method = "shared" if family == "qwen2_moe" else "drop"
    options = mc.UpcycleOptions(
        num_experts=4, top_k=2, target=family, method=method, router_std=0.5
    )
    return mc.upcycle(dense(folder, family), options)


def composed(folder: Path, family: str) -> Any:
    others = {name: dense(folder, family, seed) for name, seed in (("law", 1), ("code", 2))}
    options = mc.ComposeOptions(top_k=2, target=family, router="random", router_std=0.5)
    return mc.compose(dense(folder, family), others, options)


def added(folder: Path, family: str) -> Any:
    donor = mc.Donor("other#3", moe(folder, family, 1), 3)
    options = mc.AddOptions(name="law", router="trained")
    return mc.add_expert(moe(folder, family), donor, options)


def grouped(family: str) -> str:
    return f"{family} in groups" if f"{family} in groups" in MOES else family


def pruned(folder: Path, family: str) -> Any:
    keep = 4 if grouped(family) != family else 5
    options = mc.PruneOptions(keep=keep, criterion="random")
    return mc.prune(moe(folder, grouped(family)), None, options)


def merged(folder: Path, family: str) -> Any:
    original = moe(folder, grouped(family))
    stats = measured(original, folder / f"stats {family}")
    return mc.merge(original, stats, mc.MergeOptions(keep=4, method="hc-smoe"))


MAKE: dict[str, Callable[[Path, str], Any]] = {
    "upcycle": upcycled,
    "compose": composed,
    "add-expert": added,
    "prune": pruned,
    "merge": merged,
}


def results(folder: Path) -> Iterator[tuple[str, Path]]:
    """Case by case: its name, and the written result."""
    for operation, family in CASES:
        out = folder / f"{operation} {family}"
        if not out.exists():
            mc.write(MAKE[operation](folder, family), out)
        yield out.name, out


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment, whether it is there or not."""
    name = ENGINES.get(engine, ("", engine))[1]
    return ENVIRONMENTS / name / "bin/python" if name else Path(sys.executable)


def expected(engine: str, case: str) -> str:
    """The verdict that is right: `same`, `differs`, or `refuses`."""
    if case.split(" ", 1)[1] in UNREAD.get(engine, ()):
        return "refuses"
    return "differs" if engine in WRONG.get(case, ()) else "same"
