"""Writing a checkpoint and breaking it: the controls that every check must fail on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_compose.checkpoint.reader import Checkpoint

Tensors = dict[str, torch.Tensor]


def mutant(
    original: Checkpoint,
    folder: Path,
    tensors: Callable[[Tensors], object] | None = None,
    config: Callable[[dict], object] | None = None,
) -> Checkpoint:
    """A copy of a single-file checkpoint with its tensors or its config changed in place."""
    assert original.path is not None
    shutil.copytree(original.path, folder)
    if tensors is not None:
        loaded = load_file(folder / "model.safetensors")
        tensors(loaded)
        loaded = {n: t.clone().contiguous() for n, t in loaded.items()}
        save_file(loaded, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        path = folder / "config.json"
        found = json.loads(path.read_text())
        config(found)
        path.write_text(json.dumps(found))
    return Checkpoint.open(folder)
