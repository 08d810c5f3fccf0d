"""Quantised checkpoints run as the plain ones they stand for.

    pytest tests/runtime/test_dequantise.py

Against transformers' own dequantisation where it runs without an accelerator, and closed forms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import read_config, write_config
from safetensors.torch import load_file, save_file
from streamed import loaded_logits, make_batches, same, streamed_logits
from tiny_models import tiny_checkpoint
from torch import Tensor
from transformers import Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.runtime import Runner
from moe_compose.runtime.dequantise import dequantised

BATCHES = make_batches()


def quantise(folder: Path, to: Path, config: dict[str, Any], fold: Any) -> Checkpoint:
    """A copy whose tensors are what `fold(name, tensor)` makes of them, by name."""
    to.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= {n: t.contiguous() for n, t in fold(name, tensor).items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    write_config(to, read_config(folder) | {"quantization_config": config})
    return Checkpoint.open(to)


def plain(source: Checkpoint, to: Path, dtype: str) -> Path:
    """The dequantised source, written as a plain checkpoint."""
    found = dequantised(source, dtype)
    to.mkdir()
    kept = {n: found.read(n) for n in found.tensors}
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    write_config(to, dict(found.config))
    return to


def is_expert(name: str) -> bool:
    return ".experts." in name and name.endswith("weight")


# FP8 in blocks


def fp8(name: str, tensor: Tensor, size: int = 16) -> dict[str, Tensor]:
    """Matrices of a layer in e4m3, a scale for each 16 × 16; 40 columns are 2½ blocks."""
    if tensor.ndim != 2 or ".layers." not in name or "gate.weight" in name:
        return {name: tensor}
    rows, columns = (-(-n // size) for n in tensor.shape)
    scales = 0.01 + torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name)))
    each = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)
    each = each[: tensor.shape[0], : tensor.shape[1]]
    return {name: (tensor / each).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def test_fp8_is_what_transformers_makes_of_it(tmp_path):
    tiny_checkpoint("deepseek_v3", tmp_path / "plain")
    source = quantise(tmp_path / "plain", tmp_path / "fp8", FP8, fp8)
    found = dequantised(source, "float32")
    compared = 0
    for name, info in source.tensors.items():
        if not name.endswith("_scale_inv"):
            continue
        weight = name.removesuffix("_scale_inv")
        scales = source.read(name)
        if all(n % 16 == 0 for n in source.tensors[weight].shape):
            expected = Fp8Dequantize(None)._dequantize_one(source.read(weight), scales)
            assert torch.equal(found.read(weight), expected)
            compared += 1
        assert name not in found.config and info.dtype == "F32"
    assert compared == 3
    assert "quantization_config" not in found.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_fp8_blocks_that_do_not_fill_a_weight(tmp_path, dtype):
    """Element by element, the last block of rows and columns cut short."""
    tiny_checkpoint("deepseek_v3", tmp_path / "plain")
    source = quantise(tmp_path / "plain", tmp_path / "fp8", FP8, fp8)
    name = "model.layers.0.mlp.down_proj.weight"
    found = dequantised(source, dtype).read(name)
    weight, scales = source.read(name).double(), source.read(f"{name}_scale_inv").double()
    assert weight.shape == (32, 40) and scales.shape == (2, 3)
    for r in (0, 15, 16, 31):
        for c in (0, 15, 16, 39):
            product = weight[r, c] * scales[r // 16, c // 16]
            if dtype != "float64":
                product = product.float()
            assert found[r, c] == product.to(found.dtype)
    assert found.dtype == getattr(torch, dtype)


def test_fp8_runs(tmp_path):
    tiny_checkpoint("deepseek_v3", tmp_path / "plain")
    source = quantise(tmp_path / "plain", tmp_path / "fp8", FP8, fp8)
    written = plain(source, tmp_path / "written", "float32")
    found = streamed_logits(source, BATCHES)
    assert same(found, loaded_logits(written, BATCHES))
    assert not same(found, loaded_logits(tmp_path / "plain", BATCHES))


def test_scales_as_exponents(tmp_path):
    """Bytes are powers of two: 2^(byte − 127)."""
    (tmp_path / "a").mkdir()
    weight = torch.randn(32, 32).to(torch.float8_e4m3fn)
    scales = torch.tensor([[120, 127], [128, 140]], dtype=torch.uint8)
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "a" / "model.safetensors")
    write_config(tmp_path / "a", {"model_type": "x", "quantization_config": FP8})
    found = dequantised(Checkpoint.open(tmp_path / "a"), "float32").read("w")
    assert torch.equal(found[16:, 16:], weight.float()[16:, 16:] * 2.0**13)
    assert torch.equal(found[:16, :16], weight.float()[:16, :16] / 2.0**7)


def test_scales_that_do_not_cover_a_weight(tmp_path):
    (tmp_path / "a").mkdir()
    kept = {"w": torch.zeros(32, 32).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(3, 3)}
    save_file(kept, tmp_path / "a" / "model.safetensors")
    write_config(tmp_path / "a", {"model_type": "x", "quantization_config": FP8})
    with pytest.raises(CheckpointError, match=r"\[3, 3\] do not cover"):
        dequantised(Checkpoint.open(tmp_path / "a"), "float32").read("w")


# MXFP4


def mxfp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Experts `[E, C, R]` as random half bytes and exponents of that shape."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor.to(torch.bfloat16)}
    experts, columns, rows = tensor.shape
    generator = torch.Generator().manual_seed(len(name))
    shape = (experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(120, 126, shape, generator=generator).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


@pytest.fixture(scope="module")
def mxfp4_checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("mxfp4")
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    tiny_checkpoint("gpt_oss", folder / "plain", **sizes)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return quantise(folder / "plain", folder / "mxfp4", config, mxfp4)


def test_mxfp4_runs_as_transformers_runs_it(mxfp4_checkpoint):
    config = Mxfp4Config(dequantize=True, modules_to_not_convert=["lm_head"])
    assert mxfp4_checkpoint.path is not None
    expected = loaded_logits(
        mxfp4_checkpoint.path, BATCHES, torch.bfloat16, quantization_config=config
    )
    assert same(streamed_logits(mxfp4_checkpoint, BATCHES, dtype="bfloat16"), expected)


def test_mxfp4_element_by_element(mxfp4_checkpoint):
    name = "model.layers.1.mlp.experts.down_proj"
    found = dequantised(mxfp4_checkpoint, "float32").read(name)
    blocks = mxfp4_checkpoint.read(f"{name}_blocks")
    scales = mxfp4_checkpoint.read(f"{name}_scales")
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for e, r, c in ((0, 0, 0), (1, 3, 1), (2, 63, 32), (5, 40, 95)):
        byte = int(blocks[e, r, c // 32, c % 32 // 2])
        half = byte >> 4 if c % 2 else byte & 15
        value = magnitudes[half & 7] * (-1 if half & 8 else 1)
        assert found[e, c, r] == value * 2.0 ** (int(scales[e, r, c // 32]) - 127)


# compressed-tensors


def packed(bits: int, group: int):
    """Experts in int4 or int8, a scale for each row and group of columns."""

    def fold(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not is_expert(name):
            return {name: tensor}
        rows, columns = tensor.shape
        size = columns if group < 0 else group
        generator = torch.Generator().manual_seed(len(name))
        half = 1 << bits - 1
        whole = torch.randint(-half, half, tensor.shape, generator=generator)
        scales = torch.rand(rows, columns // size, generator=generator) / half
        fields = (whole + half).reshape(rows, -1, 32 // bits)
        words = (fields << torch.arange(0, 32, bits)).sum(-1)
        words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        stem = name.removesuffix("weight")
        return {
            f"{stem}weight_packed": words,
            f"{stem}weight_scale": scales.to(torch.bfloat16),
            f"{stem}weight_shape": torch.tensor([rows, columns]),
        }

    return fold


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, -1), (8, 8)])
def test_packed_integers(tmp_path, bits, group):
    tiny_checkpoint("qwen3_moe", tmp_path / "plain")
    config = compressed("pack-quantized", num_bits=bits, group_size=group)
    source = quantise(tmp_path / "plain", tmp_path / "packed", config, packed(bits, group))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    found = dequantised(source, "float32").read(name)
    words, scales = source.read(f"{name}_packed"), source.read(f"{name}_scale")
    for r, c in ((0, 0), (1, 7), (5, 9), (23, 31)):
        word = int(words[r, c * bits // 32]) % (1 << 32)
        field = word >> (c * bits % 32) & (1 << bits) - 1
        scale = scales[r, 0 if group < 0 else c // group].float()
        assert found[r, c] == (field - (1 << bits - 1)) * scale
    written = plain(source, tmp_path / "written", "float32")
    assert same(streamed_logits(source, BATCHES), loaded_logits(written, BATCHES))


@pytest.mark.parametrize(
    ("kind", "dtype", "strategy"),
    [
        ("float-quantized", torch.float8_e4m3fn, "channel"),
        ("float-quantized", torch.float8_e4m3fn, "tensor"),
        ("float-quantized", torch.float8_e4m3fn, "block"),
        ("int-quantized", torch.int8, "channel"),
    ],
)
def test_scaled_weights(tmp_path, kind, dtype, strategy):
    shapes = {"channel": lambda r, c: (r, 1), "tensor": lambda r, c: (1,), "block": None}

    def fold(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not is_expert(name):
            return {name: tensor}
        weight = (tensor * 50).to(dtype)
        rows, columns = tensor.shape
        shape = shapes[strategy]
        size = shape(rows, columns) if shape else (rows // 8, columns // 8)
        scales = torch.rand(size, generator=torch.Generator().manual_seed(1)) / 50
        return {name: weight, f"{name}_scale": scales}

    tiny_checkpoint("qwen3_moe", tmp_path / "plain")
    block = {"block_structure": [8, 8]} if strategy == "block" else {}
    config = compressed(kind, num_bits=8, strategy=strategy, **block)
    source = quantise(tmp_path / "plain", tmp_path / "scaled", config, fold)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weight, scales = source.read(name).float(), source.read(f"{name}_scale")
    if strategy == "block":
        scales = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(dequantised(source, "float32").read(name), weight * scales)
    written = plain(source, tmp_path / "written", "float32")
    assert same(streamed_logits(source, BATCHES), loaded_logits(written, BATCHES))


# Refusals


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        (compressed("pack-quantized", num_bits=4, symmetric=False), "zero points"),
        (compressed("nvfp4-pack-quantized", num_bits=4), "nvfp4-pack-quantized"),
        (compressed("pack-quantized", num_bits=3), "'3'"),
    ],
)
def test_other_formats_are_refused(tmp_path, config, match):
    tiny_checkpoint("qwen3_moe", tmp_path / "plain")
    source = quantise(tmp_path / "plain", tmp_path / "q", config, lambda n, t: {n: t})
    with pytest.raises(UnsupportedError, match=match):
        Runner(source)


def test_a_plain_source_is_itself(tmp_path):
    tiny_checkpoint("qwen3_moe", tmp_path)
    source = Checkpoint.open(tmp_path)
    assert dequantised(source, "float32") is source
