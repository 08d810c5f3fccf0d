"""Load balancing.

    switch   E · Σ_e f_e P_e  of one layer; 1 where balanced, E/k where k experts get all
             (2101.03961). f_e: share of all dispatches, P_e: mean probability. Layers are averaged
             afterwards: pooling their counts first, as a common implementation does, scores
             collapsed layers as balanced when they collapse onto different experts.
    z-loss   mean of logsumexp(z)² over tokens (2202.08906)
    bias     b_e += γ · sign(mean load − load_e), for choosing only (2408.15664)

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def switch_loss(counts_E: Tensor, probability_E: Tensor) -> Tensor:
    """`E Σ f_e P_e` of a layer.

    Args:
        counts_E: dispatches of each expert, over all processes.
        probability_E: sum of the tokens' probabilities, of this process's share of the tokens,
            divided by the number of tokens of all.

    Returns:
        A scalar; over all processes they add up to the loss.

    Example:
        >>> float(switch_loss(torch.tensor([5.0, 5.0]), torch.tensor([0.5, 0.5])))
        1.0
    """
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return len(counts_E) * (share_E.to(probability_E.dtype) * probability_E).sum()


def z_loss(logits_TE: Tensor, tokens: int) -> Tensor:
    """`Σ_t logsumexp(z_t)² / tokens`."""
    return logits_TE.logsumexp(-1).square().sum() / tokens


def bias_step(counts_E: Tensor, rate: float) -> Tensor:
    """What a correction bias moves by after a step in which experts got so many tokens, `[E]`."""
    return rate * torch.sign(counts_E.mean() - counts_E)
