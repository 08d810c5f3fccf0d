"""Random Qwen3-MoE checkpoints for benchmarks, written shard by shard without holding them.

Values are drawn once, 16 MB of them, and every tensor begins elsewhere among them: what is measured
on such a checkpoint is time and memory, never what it says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_compose.checkpoint.header import encode_header
from moe_compose.checkpoint.source import TensorInfo

#: Elements that are drawn.
_DRAWN = 1 << 23


def moe_config(**changes: int) -> dict:
    """`config.json`; D, F, E, K and the number of layers by their names there."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 32000,
        "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 4, "head_dim": 64,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", **changes,
    }  # fmt: skip


def tensors_of(c: dict) -> Iterator[list[TensorInfo]]:
    """The tensors, a list for every file: embedding and head, then layer by layer."""
    D, F, V, H = c["hidden_size"], c["moe_intermediate_size"], c["vocab_size"], c["head_dim"]
    Q, KV = c["num_attention_heads"] * H, c["num_key_value_heads"] * H
    outside = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    outside["lm_head.weight"] = (V, D)
    yield [TensorInfo.of(n, "BF16", s) for n, s in outside.items()]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.self_attn.q_proj.weight": (Q, D),
            f"{at}.self_attn.k_proj.weight": (KV, D),
            f"{at}.self_attn.v_proj.weight": (KV, D),
            f"{at}.self_attn.o_proj.weight": (D, Q),
            f"{at}.mlp.gate.weight": (c["num_experts"], D),
        }
        shapes |= {f"{at}.self_attn.{n}_norm.weight": (H,) for n in "qk"}
        shapes |= {f"{at}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
        for e in range(c["num_experts"]):
            shapes |= {f"{at}.mlp.experts.{e}.{p}_proj.weight": (F, D) for p in ("gate", "up")}
            shapes[f"{at}.mlp.experts.{e}.down_proj.weight"] = (D, F)
        yield [TensorInfo.of(n, "BF16", s) for n, s in shapes.items()]


def make_moe(folder: Path, **changes: int) -> int:
    """Write a random checkpoint; returns the bytes of its tensors.

    Args:
        folder: a new folder.
        changes: entries of the config.
    """
    config = moe_config(**changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parents[1] / "models/stories260K" / name, folder)
    drawn = np.random.default_rng(0).standard_normal(_DRAWN, dtype=np.float32) * np.float32(0.02)
    bits = memoryview((drawn.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    files = list(tensors_of(config))
    where: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys((t.name for t in tensors), name)
        with (folder / name).open("wb") as file:
            file.write(encode_header(tensors, {"format": "pt"}))
            for at, t in enumerate(tensors):
                left, start = t.nbytes, 2 * (7919 * (number + 31 * at) % _DRAWN)
                while left:
                    piece = bits[start : start + left]
                    left, start = left - file.write(piece), 0
    total = sum(t.nbytes for tensors in files for t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
