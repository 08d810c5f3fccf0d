"""Small checkpoints made by hand: a config and zeros under the right names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

D, F, V, LAYERS, E = 32, 40, 96, 2, 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": E,
    "num_experts_per_tok": 2,
}


#: The fixture that makes them in a test's own folder.
Make = Callable[..., Checkpoint]


def llama_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name, rows in (("q", D), ("k", D // 2), ("v", D // 2), ("o", D)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, D)
        shapes[f"{at}.input_layernorm.weight"] = (D,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (D,)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            shapes[f"{at}.mlp.{name}_proj.weight"] = shape
    return shapes


def mixtral_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {n: s for n, s in llama_shapes().items() if ".mlp." not in n}
    for i in range(LAYERS):
        at = f"model.layers.{i}.block_sparse_moe"
        shapes[f"{at}.gate.weight"] = (E, D)
        for e in range(E):
            for name, shape in (("w1", (F, D)), ("w3", (F, D)), ("w2", (D, F))):
                shapes[f"{at}.experts.{e}.{name}.weight"] = shape
    return shapes


def make_checkpoint(
    folder: Path, kind: str = "llama", files: dict[str, str] | None = None, **changes: Any
) -> Checkpoint:
    """Write a checkpoint: `llama` or `mixtral`, further files, changed config entries."""
    folder.mkdir()
    config, shapes = {"llama": (LLAMA, llama_shapes), "mixtral": (MIXTRAL, mixtral_shapes)}[kind]
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = {n: np.zeros(s, np.float32) for n, s in shapes().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file, text in (files or {}).items():
        (folder / file).write_text(text)
    return Checkpoint.open(folder)


def plan_of(source: Any, **options: Any) -> Plan:
    return upcycle(source, UpcycleOptions(**{"num_experts": 4, **options}))
