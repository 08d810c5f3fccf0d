"""A scale that nobody folds is never run without: it is folded, or the checkpoint is refused.

    pytest tests/runtime/test_lost_scales.py

Products against fp64, taken element by element; the control is the same weight without its scale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import read_config, write_config
from safetensors.torch import load_file, save_file
from streamed import make_batches, streamed_logits
from tiny_models import tiny_checkpoint
from torch import Tensor

from moe_compose.calibration.aimer import rank_by_weights
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.runtime import Runner
from moe_compose.runtime.dequantise import dequantised

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def folder_of(
    to: Path, tensors: dict[str, Tensor], config: dict[str, Any], beside: Any = None
) -> Checkpoint:
    to.mkdir(parents=True)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    write_config(to, config)
    if beside is not None:
        (to / "hf_quant_config.json").write_text(json.dumps(beside))
    return Checkpoint.open(to)


MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}

#: What the scale is called; its shape, of a weight [32, 48]; what the config says; the side file.
FP8 = {
    "tensor": ("w.weight_scale", (), {"quant_method": "fp8"}, None),
    "one": ("w.weight_scale", (1,), {"quant_method": "fp8"}, None),
    "row": ("w.weight_scale", (32, 1), {"quant_method": "fbgemm_fp8"}, None),
    "flat": ("w.weight_scale", (32,), {"quant_method": "quark"}, None),
    "block": (
        "w.weight_scale_inv",
        (2, 3),
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        None,
    ),
    "v4": ("w.scale", (2, 3), {"quant_method": "fp8", "weight_block_size": [16, 16]}, None),
    "modelopt": ("w.weight_scale", (), {"quant_method": "modelopt", "quant_algo": "FP8"}, None),
    "side file": ("w.weight_scale", (), None, MODELOPT),
}


@pytest.mark.parametrize("case", FP8)
def test_fp8_times_its_scale(tmp_path, case):
    """`W[r, c] = weight[r, c] · scale` of its tensor, row or block, in fp64."""
    name, shape, stated, beside = FP8[case]
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 48, generator=g).to(E4M3)
    scales = 2.0 ** torch.randint(-6, 6, shape, generator=g)
    stored = scales.to(E8M0) if case == "v4" else scales
    tensors = {"w.weight": weight, name: stored, "w.input_scale": torch.tensor(0.1)}
    config = {"model_type": "x"} | ({"quantization_config": stated} if stated else {})
    found = dequantised(folder_of(tmp_path / "a", tensors, config, beside), "float64")
    rows, columns = {0: (32, 48), 1: (32 // max(1, scales.numel()), 48)}.get(
        len(shape), (32 // shape[0], 48 // shape[1]) if len(shape) == 2 else (0, 0)
    )
    flat = scales.double().reshape(shape if len(shape) == 2 else (max(1, scales.numel()), 1))
    expected = weight.double() * flat.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    assert torch.equal(found.read("w.weight"), expected)
    assert not torch.equal(expected, weight.double())
    assert "quantization_config" not in found.config and name not in found.tensors


def test_a_scale_for_each_expert_of_a_stack(tmp_path):
    """ModelOpt's `<stem>_weight_scale`: [E] beside [E, R, C], also where E = R."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, 6, generator=g).to(E4M3)
    scales = torch.tensor([1.0, 2.0, 4.0, 8.0])
    tensors = {"experts.down_proj": weight, "experts.down_proj_weight_scale": scales}
    stated = {"quantization_config": {"quant_method": "modelopt"}, "model_type": "x"}
    found = dequantised(folder_of(tmp_path / "a", tensors, stated), "float32")
    for e in range(4):
        expected = weight[e].float() * scales[e]
        assert torch.equal(found.read("experts.down_proj")[e], expected)


def test_scales_for_other_experts_do_not_cover(tmp_path):
    weight = torch.zeros(4, 4, 6).to(E4M3)
    tensors = {"w": weight, "w_scale": torch.ones(4, 4)}
    stated = {"quantization_config": {"quant_method": "fp8"}, "model_type": "x"}
    found = dequantised(folder_of(tmp_path / "a", tensors, stated), "float32")
    with pytest.raises(CheckpointError):
        found.read("w")


#: Tensors that nobody decodes, and what the config says of them.
LOST = {
    "fp8 without a scale": ({"w.weight": torch.ones(8, 8).to(E4M3)}, {"quant_method": "fp8"}),
    "fp8, nothing said": (
        {"w.weight": torch.ones(8, 8).to(E4M3), "w.weight_scale": torch.ones(())},
        None,
    ),
    "I8": ({"w.weight": torch.ones(8, 8, dtype=torch.int8)}, None),
    "U8": ({"w.weight": torch.ones(8, 8, dtype=torch.uint8)}, {"quant_method": "modelopt"}),
    "packed": ({"w.qweight": torch.ones(1, 8, dtype=torch.int32)}, None),
    "a scale beside plain values": (
        {"w.weight": torch.ones(8, 8), "w.weight_scale": torch.ones(())},
        None,
    ),
    "DeepSeek-V4's name": ({"w.weight": torch.ones(8, 8), "w.scale": torch.ones(1, 1)}, None),
    "a second scale": (
        {
            "w.weight": torch.ones(8, 8).to(E4M3),
            "w.weight_scale": torch.ones(()),
            "w.weight_scale_2": torch.ones(()),
        },
        {"quant_method": "modelopt"},
    ),
    "zero points": (
        {
            "w.weight": torch.ones(8, 8).to(E4M3),
            "w.weight_scale": torch.ones(()),
            "w.weight_zero_point": torch.ones(()),
        },
        {"quant_method": "quark"},
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_nobody_decodes_is_refused(tmp_path, case):
    tensors, stated = LOST[case]
    config = {"model_type": "x"} | ({"quantization_config": stated} if stated else {})
    source = folder_of(tmp_path / "a", tensors, config)
    with pytest.raises(UnsupportedError) as e:
        dequantised(source, "float32")
    assert e.value.problems and e.value.hint


def test_what_is_plain_stays_itself(tmp_path):
    """Scales that are parameters of the model: of a norm, of a router, of activations."""
    tensors = {
        "norm.weight": torch.ones(8),
        "norm.scale": torch.ones(8),
        "router.proj.weight": torch.ones(8, 8),
        "router.scale": torch.ones(8),
        "w.weight": torch.ones(8, 8),
        "w.k_scale": torch.ones(()),
    }
    source = folder_of(tmp_path / "a", tensors, {"model_type": "x"})
    assert dequantised(source, "float32") is source


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "q"
    tiny_checkpoint("qwen3_moe", folder)
    return folder


def fp8_of(tiny: Path, to: Path, **config: Any) -> tuple[Checkpoint, Checkpoint]:
    """Experts in e4m3 with a scale for each matrix, all different; and the same as plain values."""
    codes, plain = {}, {}
    for i, (name, t) in enumerate(load_file(tiny / "model.safetensors").items()):
        if ".experts." not in name:
            codes[name] = plain[name] = t
            continue
        scale = torch.tensor(2.0 ** (i % 7 - 3))
        codes[name], codes[f"{name}_scale"] = (t / scale).to(E4M3), scale
        plain[name] = codes[name].float() * scale
    config = read_config(tiny) | config
    quantised = folder_of(to / "codes", codes, config)
    return quantised, folder_of(to / "plain", plain, read_config(tiny))


def test_the_model_that_runs_is_the_scaled_one(tiny, tmp_path):
    stated = {"quant_method": "fp8", "activation_scheme": "static"}
    codes, plain = fp8_of(tiny, tmp_path, quantization_config=stated)
    batches = make_batches()
    for a, b in zip(streamed_logits(codes, batches), streamed_logits(plain, batches), strict=True):
        assert torch.equal(a, b)
    ranked, expected = rank_by_weights(codes), rank_by_weights(plain)
    assert ranked.worths == expected.worths


@pytest.mark.parametrize("command", [Runner, rank_by_weights])
def test_nothing_runs_without_the_scales(tiny, tmp_path, command):
    codes, _ = fp8_of(tiny, tmp_path)
    with pytest.raises(UnsupportedError):
        command(codes)


def test_a_scale_that_the_class_does_not_use(tiny, tmp_path):
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.0.mlp.post_scale"] = torch.ones(4)
    source = folder_of(tmp_path / "a", tensors, read_config(tiny))
    with pytest.raises(UnsupportedError) as e:
        Runner(source)
    assert any("post_scale" in p for p in e.value.problems)
