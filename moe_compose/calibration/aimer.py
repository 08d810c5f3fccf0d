"""AIMER (2603.18492): a ranking of experts from their weights alone, without text.

    a = (Σ|w| / N) / sqrt(Σw² / N)        over all N elements of gate, up and down

An expert whose a is large, whose weights are all about the same size, is worth the least. a is at
most 1, and √(2/π) ≈ 0.798 for Gaussian weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_compose.architectures.base import Matrices
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.runtime.dequantise import dequantised
from moe_compose.surgery.ranking import Ranking
from moe_compose.surgery.selection import moe_form


def rank_by_weights(
    source: TensorSource, progress: Callable[[int, int], None] | None = None
) -> Ranking:
    """Rank all experts by AIMER. Reads every expert once, one tensor at a time.

    Args:
        source: an MoE; quantised ones are dequantised on the way.
        progress: told how many layers of how many are done.

    Raises:
        UnsupportedError: no MoE, or quantised in a way that is not known here.
        CheckpointError: a matrix is missing.
    """
    form, moe = moe_form(source)
    assert form.experts is not None
    plain = dequantised(source, "float32")
    worths = {}
    for done, layer in enumerate(moe.sparse_layers, 1):
        sums_3E = torch.zeros(3, moe.num_experts, dtype=torch.float64)
        for name, first, experts in _tensors(form.experts, layer, moe.num_experts):
            if name not in plain.tensors:
                raise CheckpointError(f"{source.label}: {name} is missing")
            _add(sums_3E, plain, name, first, experts)
        count_E, absolute_E, square_E = sums_3E
        aimer_E = (absolute_E / count_E) / (square_E / count_E).sqrt().clamp(min=1e-300)
        worths[layer] = tuple((-aimer_E).tolist())
        if progress is not None:
            progress(done, len(moe.sparse_layers))
    return Ranking(criterion="aimer", worths=worths, of={"weights_of": source.label})


def _tensors(matrices: Matrices, layer: int, experts: int) -> Iterator[tuple[str, int, int]]:
    """Name, first expert and number of experts of every tensor of a layer."""
    for template in matrices.names:
        if matrices.stacked:
            yield template.format(i=layer), 0, experts
        else:
            yield from ((template.format(i=layer, e=e), e, 1) for e in range(experts))


def _add(sums_3E: Tensor, source: TensorSource, name: str, first: int, experts: int) -> None:
    """Add a tensor's elements, |w| and w² to its experts, each of which is one run of it."""
    each, at = source.tensors[name].numel // experts, 0
    for piece in source.stream(name):
        start = 0
        while start < len(piece):
            expert, inside = divmod(at, each)
            run = piece[start : start + each - inside].double()
            sums_3E[:, first + expert] += torch.stack(
                (torch.tensor(float(len(run))).double(), run.abs().sum(), run.square().sum())
            )
            start, at = start + len(run), at + len(run)
