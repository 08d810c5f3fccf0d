"""The linear algebra of the down-projection refit, in fp64.

With P = g_e·a_e, what the second matrix of expert e is given times the dispatched weight, and r
what the layer still lacks, the change of W_d that brings most of r is ridge least squares:

    ΔW_dᵀ = (PᵀP + λI)⁻¹ Pᵀ r,        λ = ridge · mean(diag PᵀP)

Experts share tokens, so they are solved in turn, each for what the others leave (block
Gauss-Seidel), some sweeps over. (MergeMoE, 2510.14436, solves a related system for merged experts.)

Shape suffixes: T tokens, D model, F expert width, K top-k, N an expert's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows of an expert that are widened to fp64 at a time.
ROWS = 4096

#: What the second matrix of an expert is given, `[N, F]`, for tokens `[N, D]`.
Hidden = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Routed:
    """What a layer's experts are given, and what they should return together.

    Attributes:
        x_TD: the tokens.
        ids_TK: experts chosen.
        gates_TK: dispatched weights.
        lack_TD: what should be returned less what is.
        hidden: activations of an expert.
    """

    x_TD: Tensor  # noqa: N815
    ids_TK: Tensor  # noqa: N815
    gates_TK: Tensor  # noqa: N815
    lack_TD: Tensor  # noqa: N815
    hidden: Hidden

    def at(self, some_T: Tensor) -> Routed:
        """Some of the tokens."""
        x_TD, ids_TK, gates_TK = (p[some_T] for p in (self.x_TD, self.ids_TK, self.gates_TK))
        return Routed(x_TD, ids_TK, gates_TK, self.lack_TD[some_T], self.hidden)

    def of(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens `[N]` of an expert with P `[N, F]`, `ROWS` at a time."""
        token_N, slot_N = torch.where(self.ids_TK == expert)
        for start in range(0, len(token_N), ROWS):
            some_N, slots_N = token_N[start : start + ROWS], slot_N[start : start + ROWS]
            a_NF = self.hidden(expert, self.x_TD[some_N]).double()
            yield some_N, self.gates_TK[some_N, slots_N, None].double() * a_NF

    def after(self, changes: Mapping[int, Tensor]) -> Tensor:
        """What is lacking, fp64 `[T, D]`, when each expert's W_d is changed by `[D, F]`."""
        lack_TD = self.lack_TD.to(torch.float64, copy=True)
        for expert, delta_DF in changes.items():
            for token_N, p_NF in self.of(expert):
                lack_TD.index_add_(0, token_N, -(p_NF @ delta_DF.T))
        return lack_TD


def solve(gram_FF: Tensor, right_FD: Tensor, ridge: float) -> Tensor:
    """`(G + λI)⁻¹ B`, with `λ = ridge · mean(diag G)`; zeros where G is zero.

    Args:
        gram_FF: PᵀP, fp64.
        right_FD: Pᵀr, fp64.
        ridge: λ as a share of the mean diagonal.
    """
    mean = gram_FF.diagonal().mean()
    if not bool(mean > 0):
        return torch.zeros_like(right_FD)
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    factor_FF = torch.linalg.cholesky(gram_FF + ridge * mean * eye_FF)
    return torch.cholesky_solve(right_FD, factor_FF)


def fit(routed: Routed, experts: list[int], *, ridge: float, sweeps: int) -> dict[int, Tensor]:
    """Changes of W_d, fp64 `[D, F]` by expert.

    Args:
        routed: the tokens to fit to.
        experts: in this order.
        ridge: as in `solve`; of the change that a sweep makes.
        sweeps: how often each is solved for.
    """
    lack_TD = routed.lack_TD.to(torch.float64, copy=True)
    changes: dict[int, Tensor] = {}
    for _ in range(sweeps):
        for expert in experts:
            gram_FF, right_FD = _normal(routed, expert, lack_TD)
            if gram_FF is None or right_FD is None:
                continue
            step_FD = solve(gram_FF, right_FD, ridge)
            for token_N, p_NF in routed.of(expert):
                lack_TD.index_add_(0, token_N, -(p_NF @ step_FD))
            changes[expert] = changes.get(expert, 0.0) + step_FD.T
    return changes


def _normal(routed: Routed, expert: int, lack_TD: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """PᵀP and Pᵀr; None of an expert without tokens."""
    gram_FF: Tensor | None = None
    right_FD: Tensor | None = None
    for token_N, p_NF in routed.of(expert):
        gram, right = p_NF.T @ p_NF, p_NF.T @ lack_TD[token_N]
        gram_FF = gram if gram_FF is None else gram_FF + gram
        right_FD = right if right_FD is None else right_FD + right
    return gram_FF, right_FD
