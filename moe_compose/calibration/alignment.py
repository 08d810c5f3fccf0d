"""Which neuron of one expert corresponds to which of another: permuting an expert's neurons changes
nothing of what it computes, and everything of what an average with another computes.

    weights       maximise Σ_i <a_i, b_π(i)> over the rows of [gate | up | downᵀ] (and biases), as
                  M-SMoE does (2310.01334)
    activations   minimise Σ_i D[i, π(i)]; D is the distance of normalised hidden activations on
                  the same tokens, plus that of the first 64 principal components of
                  [gate | up | downᵀ], each divided by its own mean (REAM, 2604.04356)

Both are assignment problems, solved exactly by `scipy.optimize.linear_sum_assignment`. It takes
O(F³) at most: measured on one core 0.3 s for F = 1408, 1 s for 2048, 6 s for 7168. Two experts are
in memory at a time.

Shape suffixes: F neurons, S tokens of the sample, P numbers that belong to a neuron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_compose.architectures.base import Matrices
from moe_compose.calibration.grouping import needs
from moe_compose.calibration.similarity import Similarity
from moe_compose.calibration.stats import ExpertStats
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.surgery.evaluate import value
from moe_compose.surgery.groups import ExpertGroups, Grouping
from moe_compose.surgery.indices import Order
from moe_compose.surgery.neurons import parts_of
from moe_compose.surgery.selection import moe_form

#: Principal components of weights that are compared.
COMPONENTS = 64

#: Columns drawn beyond them, and rounds, to find them.
_BEYOND, _ROUNDS = 16, 4


def align(
    source: TensorSource,
    grouping: Grouping,
    by: str,
    stats: ExpertStats | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Grouping:
    """Find the order of every merged expert's neurons. Reads the weights of groups of two and more.

    Args:
        source: the checkpoint.
        grouping: which experts become one.
        by: `weights` or `activations`.
        stats: with similarities, for `activations`.
        progress: told how many layers of how many are done.

    Returns:
        The grouping with `orders`. Where no hidden activations could be gathered, neurons are
        compared by weights, and a note says so.

    Raises:
        CheckpointError: a tensor is missing, or is not a number somewhere.
        UnsupportedError: scipy is not installed.
    """
    form, moe = moe_form(source)
    assert form.experts is not None
    reader = _Reader(source, form.experts, moe.num_experts)
    orders, without = {}, []
    for done, (layer, groups) in enumerate(sorted(grouping.layers.items()), 1):
        found = None
        if by == "activations" and stats is not None and not groups.trivial:
            found = stats.similarity(layer)
            if found.scale_E is None:
                without.append(layer)
                found = None
        orders[layer] = _layer(reader, layer, groups, found)
        if progress is not None:
            progress(done, len(grouping.layers))
    notes = grouping.notes
    if without:
        notes += (f"no hidden activations of layers {without}: neurons aligned by weights there",)
    return replace(grouping, orders=orders, aligned=by, notes=notes)


def match(cost_FF: Tensor) -> list[int]:
    """Row i's column in the assignment of least total cost."""
    solve = needs("scipy.optimize").linear_sum_assignment
    _, columns = solve(cost_FF.numpy())
    return [int(c) for c in columns]


def weight_cost(a_FP: Tensor, b_FP: Tensor) -> Tensor:
    """`−<a_i, b_j>`; its least assignment is that of the least Σ‖a_i − b_π(i)‖², since norms do
    not depend on π.
    """
    return -(a_FP @ b_FP.T)


def activation_cost(a_FS: Tensor, b_FS: Tensor, a_FP: Tensor, b_FP: Tensor) -> Tensor:
    """Distances of normalised activations and of principal components, each over its mean."""
    hidden_FF = torch.cdist(_unit(a_FS), _unit(b_FS), compute_mode=_EXACT)
    a, b = principal(torch.cat((a_FP, b_FP)), COMPONENTS).chunk(2)
    weights_FF = torch.cdist(a, b, compute_mode=_EXACT)
    return _over_mean(hidden_FF) + _over_mean(weights_FF)


#: Through differences, not through products, which lose small distances.
_EXACT = "donot_use_mm_for_euclid_dist"


def principal(x_NP: Tensor, count: int) -> Tensor:
    """The first principal components, `[N, count]`; the centred rows themselves where there are no
    more. By subspace iteration from a fixed draw.
    """
    import numpy as np

    x_NP = x_NP - x_NP.mean(0)
    if min(x_NP.shape) <= count + _BEYOND:
        return x_NP
    shape = (x_NP.shape[1], count + _BEYOND)
    drawn = np.random.Generator(np.random.PCG64(0)).standard_normal(shape, dtype=np.float32)
    basis = torch.from_numpy(drawn).to(x_NP)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(x_NP.T @ (x_NP @ basis)).Q
    reduced = x_NP @ basis
    _, _, turn = torch.linalg.svd(reduced, full_matrices=False)
    found: Tensor = reduced @ turn[:count].T
    return found


class _Reader:
    """Reads one expert's weights by neuron."""

    def __init__(self, source: TensorSource, lie: Matrices, experts: int) -> None:
        self._source, self._lie, self._experts = source, lie, experts

    def weights(self, layer: int, expert: int) -> Tensor:
        """`[gate | up | downᵀ]` and biases, `[F, P]`, fp32."""
        parts = parts_of(self._lie, self._source.tensors, layer, expert, self._experts, "source")
        rows = []
        for part in parts:
            found = part.by_neuron(value(part.x, {"source": self._source}))
            if found is not None:
                rows.append(found.float())
        if not rows:
            raise CheckpointError(f"{self._source.label}: layer {layer} has no expert {expert}")
        x_FP = torch.cat(rows, 1)
        if not bool(torch.isfinite(x_FP).all()):
            raise CheckpointError(
                f"{self._source.label}: expert {expert} of layer {layer} has weights that are no "
                "numbers"
            )
        return x_FP


def _layer(
    reader: _Reader, layer: int, groups: ExpertGroups, found: Similarity | None
) -> dict[int, Order]:
    orders = {}
    for first, *others in groups.members:
        if not others:
            continue
        a_FP = reader.weights(layer, first)
        a_FS = None if found is None else found.hidden(first).T
        for e in others:
            b_FP = reader.weights(layer, e)
            if found is None or a_FS is None:
                cost = weight_cost(a_FP, b_FP)
            else:
                cost = activation_cost(a_FS, found.hidden(e).T, a_FP, b_FP)
            orders[e] = Order.of(match(cost))
    return orders


def _unit(x_FS: Tensor) -> Tensor:
    norm_F: Tensor = x_FS.norm(dim=1, keepdim=True)
    return x_FS / norm_F.clamp(min=1e-30)


def _over_mean(x: Tensor) -> Tensor:
    return x / x.mean().clamp(min=1e-30)
