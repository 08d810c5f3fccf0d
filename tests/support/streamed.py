"""Batches, a loaded model's logits on them, and a streamed run's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compose.checkpoint.source import TensorSource
from moe_compose.runtime import Batch, Runner


def make_batches(vocabulary: int = 96) -> list[Batch]:
    """Two sequences of 28 tokens, one of them padded, and one of 17: longer than every window of
    the tiny models, and shorter than some.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (2, 28), generator=generator)
    short = torch.randint(3, vocabulary, (1, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    return [Batch(ids, mask), Batch(short)]


def loaded_logits(
    folder: Path, batches: Sequence[Batch], dtype: torch.dtype = torch.float32, **options: Any
) -> list[Tensor]:
    """Logits of the model as transformers loads it, whole, with eager experts.

    Its weights are moved to memory of torch's own: where they lie in the mapped file they are not
    aligned, and on some processors matrix products of odd shapes then differ in the last bit.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation="eager", local_files_only=True, **options
        ).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return [
            model(input_ids=b.ids, attention_mask=b.mask, use_cache=False).logits for b in batches
        ]


def streamed_logits(
    source: TensorSource | Runner, batches: Sequence[Batch], **options: Any
) -> list[Tensor]:
    """Logits of the same, layer by layer."""
    runner = source if isinstance(source, Runner) else Runner(source, **options)
    found: dict[int, Tensor] = {}
    runner.run(batches, logits=found.__setitem__)
    assert sorted(found) == list(range(len(batches)))
    return [found[i] for i in range(len(batches))]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal in every bit, shape and dtype."""
    return all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )
