"""Balancing losses against closed forms, and how a spread is described.

pytest tests/training/test_balance.py
"""

from __future__ import annotations

import math

import pytest
import torch

from moe_compose.training.balance import bias_step, switch_loss, z_loss
from moe_compose.training.measure import Spread


@pytest.mark.parametrize(
    ("counts", "probabilities", "expected"),
    [
        ([5, 5, 5, 5], [0.25] * 4, 1.0),  # balanced
        ([20, 20, 0, 0], [0.5, 0.5, 0, 0], 2.0),  # k = 2 of E = 4 get all: E/k
        ([10, 0, 0, 0], [1.0, 0, 0, 0], 4.0),
        ([10, 0, 0, 0], [0.25] * 4, 1.0),  # E Σ f_e/E
        ([3, 1], [0.6, 0.4], 2 * (0.75 * 0.6 + 0.25 * 0.4)),
    ],
)
def test_switch(counts: list[float], probabilities: list[float], expected: float) -> None:
    p_E = torch.tensor(probabilities, dtype=torch.float64)
    assert float(switch_loss(torch.tensor(counts).float(), p_E)) == pytest.approx(expected)


def test_layers_are_not_pooled() -> None:
    """Two layers, each collapsed onto another expert: each is at its worst. Pooled, as a common
    implementation does, they would look balanced: the control.
    """
    counts_LE = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    p_LE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    each = [float(switch_loss(c, p)) for c, p in zip(counts_LE, p_LE, strict=True)]
    assert each == [2.0, 2.0]
    assert float(switch_loss(counts_LE.sum(0), p_LE.mean(0))) == 1.0


def test_z_loss_and_bias() -> None:
    assert float(z_loss(torch.zeros(3, 8), 3)) == pytest.approx(math.log(8) ** 2)
    assert bias_step(torch.tensor([6.0, 3.0, 0.0]), 0.1).tolist() == pytest.approx([-0.1, 0, 0.1])


def test_spread() -> None:
    even, one = Spread.of([4.0] * 4), Spread.of([8.0, 0.0, 0.0, 0.0])
    assert (even.entropy, even.dead, even.max_violation) == pytest.approx((1, 0, 0))
    assert (one.entropy, one.dead, one.max_violation) == pytest.approx((0, 3, 3))
