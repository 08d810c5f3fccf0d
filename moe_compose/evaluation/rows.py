"""What two models' logits say at each position, in fp64.

Shape suffixes: N positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """One value a position.

    Attributes:
        loss_N: `−ln p(next token)` of the model, in nats; 0 where there is no next token.
        reference_loss_N: the same of the reference.
        kl_N: KL(reference ‖ model), in nats.
        overlap_N: `Σ min(p, q)`: 1 for equal distributions, 0 for disjoint ones.
        same_N: whether both rank the same token first.
        delta_N: `‖Δ‖²` of the logits.
        norm_N: `‖reference‖²`.
        largest_N: largest absolute difference of two logits.
    """

    loss_N: Tensor  # noqa: N815
    reference_loss_N: Tensor  # noqa: N815
    kl_N: Tensor  # noqa: N815
    overlap_N: Tensor  # noqa: N815
    same_N: Tensor  # noqa: N815
    delta_N: Tensor  # noqa: N815
    norm_N: Tensor  # noqa: N815
    largest_N: Tensor  # noqa: N815


def losses(logits_NV: Tensor, next_N: Tensor) -> Tensor:
    """`−ln p(next)` in fp64, `[N]`; 0 where `next_N` is negative.

    Args:
        logits_NV: any float dtype.
        next_N: token ids; −1 where there is no next token.
    """
    return _loss(logits_NV.double().log_softmax(-1), next_N)


def compare_rows(reference_NV: Tensor, logits_NV: Tensor, next_N: Tensor) -> Rows:
    """All measures at each position.

    Args:
        reference_NV: logits of the reference.
        logits_NV: logits of the model held to it.
        next_N: token ids; −1 where there is no next token.
    """
    ref, got = reference_NV.double(), logits_NV.double()
    log_p, log_q = ref.log_softmax(-1), got.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return Rows(
        loss_N=_loss(log_q, next_N),
        reference_loss_N=_loss(log_p, next_N),
        kl_N=torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1),
        overlap_N=torch.minimum(p, q).sum(-1),
        same_N=ref.argmax(-1) == got.argmax(-1),
        delta_N=(got - ref).square().sum(-1),
        norm_N=ref.square().sum(-1),
        largest_N=(got - ref).abs().amax(-1),
    )


def _loss(log_p_NV: Tensor, next_N: Tensor) -> Tensor:
    there = next_N >= 0
    taken_N = log_p_NV.gather(-1, next_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(there, -taken_N, 0.0)
