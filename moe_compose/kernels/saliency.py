"""What pruning wants to know of the experts, gathered while the layer runs (METHODS section 5).

Over the (token, expert) pairs that the router chose, with g the weight and f the expert's output
before it: n, Σg, Σ‖f‖, Σ‖f‖², Σg‖f‖ and max‖f‖. From these follow REAP (2510.13999, eq. 9:
Σg‖f‖ / n), SEER-MoE's gate sums (2404.05089), and expert activation norms (2504.05586).

Shape suffixes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows of `Saliency.table_6E`.
MEASURES = ("count", "gate", "norm", "norm_sq", "gated_norm", "max_norm")


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """Running sums, which every `moe_forward` that is given them adds its pairs to.

    Attributes:
        table_6E: one row per measure, in the order of `MEASURES`; fp64, contiguous.

    Example:
        >>> saliency = Saliency.zeros(8)
        >>> saliency["count"].shape                                           # [E]
        torch.Size([8])
    """

    table_6E: Tensor  # noqa: N815

    @classmethod
    def zeros(cls, experts: int, device: torch.device | str = "cpu") -> Saliency:
        """Sums over no pairs yet."""
        return cls(table_6E=torch.zeros(6, experts, dtype=torch.float64, device=device))

    def __getitem__(self, measure: str) -> Tensor:
        return self.table_6E[MEASURES.index(measure)]

    def add(self, expert: int, gates: Tensor, outputs: Tensor) -> None:
        """Count one expert's pairs: `gates` is `[n]`, `outputs` `[n, D]`."""
        norms = outputs.detach().double().norm(dim=-1)
        gates = gates.detach().double()
        sums = (gates.sum(), norms.sum(), norms.square().sum(), (gates * norms).sum())
        column = self.table_6E[:, expert]
        column[0] += len(gates)
        column[1:5] += torch.stack(sums)
        column[5] = torch.maximum(column[5], norms.max())
