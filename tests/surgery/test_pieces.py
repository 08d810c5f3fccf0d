"""Means of tensors are taken in pieces: the same values, in little memory.

    pytest tests/surgery/test_pieces.py

Control: pieces of one model shifted against the other's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moe_compose as mc
from moe_compose.checkpoint import reader
from moe_compose.surgery.arithmetic import Cast
from moe_compose.surgery.averages import Mean
from moe_compose.surgery.evaluate import stream, value
from moe_compose.surgery.transforms import Read

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, mc.Checkpoint]:
    """One tensor each, of several dtypes, so that pieces of equal bytes are of unequal lengths."""
    found = {}
    for i, dtype in enumerate(DTYPES):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        drawn = torch.randn(37, 29, generator=torch.Generator().manual_seed(i))
        save_file({"w": drawn.to(dtype), "none": torch.zeros(0, 3)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
        found[folder.name] = mc.Checkpoint.open(folder)
    return found


@pytest.mark.parametrize("chunk", [8, 64, 1000, 1 << 20])
def test_a_mean_in_pieces(
    models: dict[str, mc.Checkpoint], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    reads = tuple(Read(name, model.tensors["w"]) for name, model in models.items())
    node = Cast(Mean(reads, (0.5, 0.3, 0.2)), "BF16")
    pieces = list(stream(node, models))
    whole = sum(
        m.read("w").double() * w for m, w in zip(models.values(), (0.5, 0.3, 0.2), strict=True)
    )
    assert torch.equal(torch.cat(pieces), whole.float().bfloat16().reshape(-1))
    assert torch.equal(value(node, models).reshape(-1), torch.cat(pieces))
    assert max(map(len, pieces)) <= max(1, chunk // 4)
    assert (len(pieces) > 1) == (chunk < 37 * 29 * 4)
    first, *rest = (m.read("w").double().reshape(-1) for m in models.values())
    shifted = first.roll(1) * 0.5 + rest[0] * 0.3 + rest[1] * 0.2
    assert not torch.equal(torch.cat(pieces), shifted.float().bfloat16())


def test_nothing_gives_nothing(models: dict[str, mc.Checkpoint]) -> None:
    reads = tuple(Read(name, model.tensors["none"]) for name, model in models.items())
    node = Mean(reads, (0.5, 0.3, 0.2))
    assert list(stream(node, models)) == []
    assert value(node, models).shape == (0, 3)
