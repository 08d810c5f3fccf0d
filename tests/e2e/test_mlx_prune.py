"""Pruned and merged checkpoints read by another implementation: mlx-lm on the CPU gives
transformers' fp32 logits, also for odd numbers of experts.

pytest tests/e2e/test_mlx_prune.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merged import measured
from mutants import mutant
from pruned import lively_checkpoint
from transformers import AutoModelForCausalLM

import moe_compose as mc

os.environ["MLX_DISABLE_COMPILE"] = "1"  # compiling for the CPU starts a C++ compiler per kernel
if sys.platform == "win32":
    pytest.skip("mlx has no build for Windows", allow_module_level=True)
import mlx.core as mx
import mlx_lm.utils as mlx_utils

IDS = [1, 5, 9, 40, 33, 2, 71, 90, 8, 15, 16, 23, 42]

#: Family → what its readers agree on, experts before, experts after.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": ({"num_local_experts": 8}, 7),
    "qwen3_moe": ({"num_experts": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}, 3),
    "qwen2_moe": (
        {"num_experts": 8, "mlp_only_layers": None, "intermediate_size": 40}, 5,
    ),
    "olmoe": ({"num_experts": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}, 6),
    "deepseek_v3": (
        {
            "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "kv_lora_rank": 512,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32,
        },
        12,
    ),
}  # fmt: skip


def both_dialects(config: dict[str, Any]) -> None:
    """What transformers 5 leaves out when it saves, and published checkpoints have."""
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config["dtype"]
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    if "n_routed_experts" in config:
        config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


def mlx_logits(folder: Path) -> np.ndarray:
    model, _ = mlx_utils.load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([IDS])))[0]


def transformers_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("family", CASES)
def test_same_logits(family: str, tmp_path: Path) -> None:
    changes, keep = CASES[family]
    tiny = lively_checkpoint(family, tmp_path / "tiny", **changes)
    source = mutant(tiny, tmp_path / "source", config=both_dialects)
    plan = mc.prune(source, None, mc.PruneOptions(keep=keep, criterion="random"))
    out = mc.write(plan, tmp_path / "out").path
    ours, theirs = transformers_logits(out), mlx_logits(out)
    scale = np.linalg.norm(ours)
    assert np.linalg.norm(theirs - ours) / scale <= 1e-5
    assert np.linalg.norm(ours - transformers_logits(source.path)) / scale > 1e-2


def test_a_broken_control_differs(tmp_path: Path) -> None:
    """Router rows that stayed behind load without a word, and give something else."""
    source = lively_checkpoint("mixtral", tmp_path / "tiny", num_local_experts=8)
    source = mutant(source, tmp_path / "source", config=both_dialects)
    plan = mc.prune(source, None, mc.PruneOptions(keep=5, criterion="random"))
    out = mc.write(plan, tmp_path / "out")

    def left_behind(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.gate.weight"
        tensors[name] = source.read(name)[:5]

    broken = mutant(out, tmp_path / "broken", tensors=left_behind)
    expected = transformers_logits(out.path)
    difference = np.linalg.norm(mlx_logits(broken.path) - expected)
    assert difference / np.linalg.norm(expected) > 1e-3


@pytest.mark.parametrize("family", CASES)
def test_merged(family: str, tmp_path: Path) -> None:
    """The same of merged experts."""
    changes, keep = CASES[family]
    tiny = lively_checkpoint(family, tmp_path / "tiny", **changes)
    source = mutant(tiny, tmp_path / "source", config=both_dialects)
    stats = measured(source, tmp_path / "stats")
    out = mc.write(mc.merge(source, stats, mc.MergeOptions(keep=keep)), tmp_path / "out").path
    ours, theirs = transformers_logits(out), mlx_logits(out)
    scale = np.linalg.norm(ours)
    assert np.linalg.norm(theirs - ours) / scale <= 1e-5
    assert np.linalg.norm(ours - transformers_logits(source.path)) / scale > 1e-2
