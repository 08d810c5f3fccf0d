"""Tiny MoEs whose routers have something to say, and the original with experts masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from torch import Tensor

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.runtime import Batch, Runner
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.surgery.selection import select_experts
from moe_compose.validation.masked import Masked, masking

#: Names of correction biases; transformers initialises them with zeros.
BIASES = ("correction_bias", "expert_bias", "balancing_biases")


def lively_checkpoint(family: str, folder: Path, seed: int = 0, **changes: Any) -> Checkpoint:
    """A tiny model with correction biases that decide something and tables that name k experts."""
    model = tiny_model(family, seed=seed, **changes)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if any(word in name for word in BIASES) or name.endswith("gate.bias"):
            tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor) / 4
            if name.endswith("balancing_biases"):  # transformers resets the last one on loading
                tensor.data[-1] = -1.0
        if name.endswith("tid2eid"):
            tokens, top_k = tensor.shape
            experts = model.config.num_local_experts
            rows = torch.rand(tokens, experts, generator=generator).argsort(1)
            tensor.data = rows[:, :top_k].to(tensor)
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


def run(source: TensorSource, batches: Sequence[Batch | Tensor], **options: Any) -> list[Tensor]:
    """Logits, streamed."""
    found: dict[int, Tensor] = {}
    Runner(source, dtype="float32").run(batches, logits=found.__setitem__, **options)
    return [found[i] for i in range(len(batches))]


def masked_run(
    source: TensorSource, kept: Mapping[int, Sequence[int]], batches: Sequence[Batch | Tensor]
) -> list[Tensor]:
    """Logits of the source with only `kept` experts in reach."""
    return run(Masked(source, kept), batches, on_layer=masking(source, kept))


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖Δ‖₂ / ‖expected‖₂ over all batches."""
    a, b = (torch.cat([x.double().flatten() for x in xs]) for xs in (found, expected))
    return float((a - b).norm() / b.norm())


def selected(source: TensorSource, chosen: Mapping[int, Sequence[int]], **how: Any) -> Plan:
    """A selection as a plan."""
    found = select_experts(source, chosen, **how)
    return Plan(
        operation="select",
        options={},
        config=found.config,
        outputs=found.outputs,
        sources={"source": source},
        preservation=Preservation("none", "a test"),
        dropped=found.dropped,
    ).check()


def raw(source: TensorSource, name: str) -> bytes:
    """A tensor's bytes, read from where they lie."""
    found = source.extents(name)
    assert found is not None, f"{name} is computed"
    parts = []
    for extent in found:
        with extent.path.open("rb") as file:
            file.seek(extent.offset)
            parts.append(file.read(extent.nbytes))
    return b"".join(parts)
