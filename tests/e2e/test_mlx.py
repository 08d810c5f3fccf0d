"""Results of upcycle read by another implementation: mlx-lm on the CPU gives transformers' fp32
logits.

mlx-lm reads the folder itself and is strict about missing and surplus tensors. pytest
tests/e2e/test_mlx.py
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import dense_checkpoint, dense_llama
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

os.environ["MLX_DISABLE_COMPILE"] = "1"  # compiling for the CPU starts a C++ compiler per kernel
if sys.platform == "win32":
    pytest.skip("mlx has no build for Windows", allow_module_level=True)
import mlx.core as mx
import mlx_lm.utils as mlx_utils

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
IDS = [1, 5, 9, 40, 33, 2, 71, 90, 8, 15, 16, 23, 42]

QWEN = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rope_theta": 50000.0, "tie_word_embeddings": False, "rms_norm_eps": 3e-6,
}  # fmt: skip

SOURCES = {
    "mixtral": lambda folder: dense_llama(folder),
    "mixtral from stories260K": lambda folder: Checkpoint.open(STORIES),
    "qwen2_moe": lambda folder: dense_checkpoint(Qwen2Config(**QWEN), folder),
    "qwen3_moe": lambda folder: dense_checkpoint(Qwen3Config(**QWEN, head_dim=16), folder),
}


def mlx_logits(folder: Path) -> np.ndarray:
    model, _ = mlx_utils.load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([IDS])))[0]


def transformers_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.fixture(scope="module", params=list(SOURCES))
def result(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx")
    name = request.param
    dense = SOURCES[name](folder / "dense")
    method = "shared" if name == "qwen2_moe" else "copy"
    options = UpcycleOptions(num_experts=4, top_k=2, method=method, router_std=0.5)
    return dense, write(upcycle(dense, options), folder / "moe")


def test_same_logits(result):
    dense, moe = result
    ours, theirs = transformers_logits(moe.path), mlx_logits(moe.path)
    scale = np.linalg.norm(ours)
    assert np.linalg.norm(theirs - ours) / scale <= 5e-6
    assert np.linalg.norm(ours - transformers_logits(dense.path)) / scale <= 1e-6


def test_a_broken_control_differs(result, tmp_path):
    """The comparison can fail: one layer's norm changed on the way."""
    from mutants import mutant

    _, moe = result

    def loud(tensors):
        tensors["model.layers.0.post_attention_layernorm.weight"] *= 1.01

    broken = mutant(moe, tmp_path / "broken", tensors=loud)
    difference = np.linalg.norm(mlx_logits(broken.path) - transformers_logits(moe.path))
    assert difference / np.linalg.norm(transformers_logits(moe.path)) > 1e-5
