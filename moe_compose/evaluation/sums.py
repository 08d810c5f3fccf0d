"""Measures added up by domain and by layer, in fp64, batch after batch in a fixed order.

Shape suffixes: B sequences, S positions, V vocabulary, N real positions, C columns of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compose.calibration.tokens import Rows
from moe_compose.evaluation.result import DomainScore, LayerScore
from moe_compose.evaluation.rows import compare_rows, losses

#: Columns of `Sums.domains`.
_COLUMNS = ("tokens", "predicted", "loss", "reference_loss", "kl", "top1", "overlap")

#: Logits that are widened to fp64 at a time, in elements.
_AT_ONCE = 1 << 24


class Sums:
    """Running sums of an evaluation.

    Args:
        domains: how many.
        layers: how many are compared.
        compared: whether there is a reference.
    """

    def __init__(self, domains: int, layers: int, *, compared: bool) -> None:
        self.compared = compared
        self.domains = torch.zeros(domains, len(_COLUMNS), dtype=torch.float64)
        self.layers = torch.zeros(layers, 2, dtype=torch.float64)

    def add_logits(self, rows: Rows, logits_BSV: Tensor, reference_BSV: Tensor | None) -> None:
        """Count a batch's logits; padded positions don't count."""
        ids_BS, real_BS = rows.batch.ids, rows.real
        next_BS = torch.full_like(ids_BS, -1)
        next_BS[:, :-1] = torch.where(real_BS[:, 1:], ids_BS[:, 1:], -1)
        domain_BS = rows.domain_B[:, None].expand_as(ids_BS)
        step = max(1, _AT_ONCE // logits_BSV.shape[-1])
        at_N = real_BS.flatten().nonzero()[:, 0]
        for some in torch.split(at_N, step):
            next_N = next_BS.flatten()[some]
            picked = logits_BSV.flatten(0, 1)[some].cpu()
            other = None if reference_BSV is None else reference_BSV.flatten(0, 1)[some].cpu()
            values = self._columns(picked, other, next_N)
            self.domains.index_add_(0, domain_BS.flatten()[some], values)

    def _columns(self, logits_NV: Tensor, reference_NV: Tensor | None, next_N: Tensor) -> Tensor:
        counted = [torch.ones(len(next_N)), next_N >= 0]
        if reference_NV is None:
            none = torch.zeros(len(next_N))
            measured = [losses(logits_NV, next_N), none, none, none, none]
        else:
            r = compare_rows(reference_NV, logits_NV, next_N)
            measured = [r.loss_N, r.reference_loss_N, r.kl_N, r.same_N, r.overlap_N]
        return torch.stack([c.double() for c in (*counted, *measured)], -1)

    def add_layer(self, layer: int, rows: Rows, reference_BSD: Tensor, output_BSD: Tensor) -> None:
        """Count a batch's output of a layer."""
        real_BS = rows.real.to(output_BSD.device)
        ref, got = reference_BSD[real_BS].double(), output_BSD[real_BS].double()
        self.layers[layer, 0] += float((got - ref).square().sum())
        self.layers[layer, 1] += float(ref.square().sum())

    def score(self, chosen: Sequence[int]) -> DomainScore:
        """The means over some domains together."""
        sums = dict(zip(_COLUMNS, self.domains[list(chosen)].sum(0).tolist(), strict=True))
        tokens, predicted = sums["tokens"], max(sums["predicted"], 1.0)
        score = DomainScore(int(tokens), int(sums["predicted"]), sums["loss"] / predicted)
        if not self.compared:
            return score
        return DomainScore(
            score.tokens,
            score.predicted,
            score.loss,
            reference_loss=sums["reference_loss"] / predicted,
            kl=sums["kl"] / tokens,
            top1=sums["top1"] / tokens,
            overlap=sums["overlap"] / tokens,
        )

    def layer_scores(self) -> tuple[LayerScore, ...]:
        """Every layer's relative error."""
        return tuple(
            LayerScore(i, math.sqrt(delta / norm) if norm else math.inf)
            for i, (delta, norm) in enumerate(self.layers.tolist())
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, exact."""
        return {"domains": self.domains.tolist(), "layers": self.layers.tolist()}

    def add_json(self, saved: dict[str, Any]) -> None:
        """Add what `to_json` gave.

        Raises:
            ValueError: sums of another shape.
        """
        for mine, theirs in ((self.domains, saved["domains"]), (self.layers, saved["layers"])):
            other = torch.tensor(theirs, dtype=torch.float64).reshape(-1, mine.shape[1])
            if other.shape != mine.shape:
                raise ValueError(f"sums of shape {list(other.shape)}, not {list(mine.shape)}")
            mine += other
