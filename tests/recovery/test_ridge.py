"""The ridge least squares of the refit, against numpy, and a solution that is known.

pytest tests/recovery/test_ridge.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_compose.recovery import ridge
from moe_compose.recovery.ridge import Routed, fit, solve

TOKENS, MODEL, WIDTH, EXPERTS = 400, 6, 5, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_closed_form() -> None:
    p_NF, r_ND = drawn(50, WIDTH, seed=0), drawn(50, MODEL, seed=1)
    gram = p_NF.numpy().T @ p_NF.numpy()
    penalty = 0.03 * np.trace(gram) / WIDTH * np.eye(WIDTH)
    expected = np.linalg.inv(gram + penalty) @ p_NF.numpy().T @ r_ND.numpy()
    found = solve(p_NF.T @ p_NF, p_NF.T @ r_ND, 0.03)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    assert not solve(torch.zeros(4, 4).double(), torch.zeros(4, 2).double(), 0.03).any()


def known(monkeypatch: pytest.MonkeyPatch) -> tuple[Routed, dict[int, Tensor]]:
    """Tokens of two experts each, and a lack that changes of W_d explain whole."""
    monkeypatch.setattr(ridge, "ROWS", 37)  # several pieces an expert
    first_EFD = drawn(EXPERTS, WIDTH, MODEL, seed=2)
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2]
    gates_TK = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64) + 0.1
    x_TD = drawn(TOKENS, MODEL, seed=4)
    truth = {e: drawn(MODEL, WIDTH, seed=10 + e) for e in range(EXPERTS)}

    def hidden(expert: int, x_ND: Tensor) -> Tensor:
        return (x_ND @ first_EFD[expert].T).relu()

    empty = Routed(x_TD, ids_TK, gates_TK, torch.zeros(TOKENS, MODEL).double(), hidden)
    return replace(empty, lack_TD=-empty.after(truth)), truth


def test_a_known_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    routed, truth = known(monkeypatch)
    found = fit(routed, [0, 1, 2], ridge=1e-12, sweeps=200)
    for expert, delta in truth.items():
        torch.testing.assert_close(found[expert], delta, rtol=1e-6, atol=1e-6)
    assert float(routed.after(found).norm()) < 1e-6 * float(routed.lack_TD.norm())
    # the dispatched weights belong into P: without them nothing explains the lack
    wrong = fit(replace(routed, gates_TK=torch.ones(TOKENS, 2)), [0, 1, 2], ridge=1e-12, sweeps=200)
    assert float(routed.after(wrong).norm()) > 0.1 * float(routed.lack_TD.norm())


def test_sweeps_lower_the_error_of_what_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    routed, _ = known(monkeypatch)
    before = routed.lack_TD.clone()
    errors = [
        float(routed.after(fit(routed, [0, 1, 2], ridge=0.03, sweeps=n)).norm()) for n in (1, 2, 4)
    ]
    assert float(before.norm()) > errors[0] > errors[1] > errors[2]
    assert torch.equal(routed.lack_TD, before), "what was measured is not touched"
    only = fit(routed, [1], ridge=0.03, sweeps=1)
    assert list(only) == [1]


def test_one_expert_is_the_closed_form_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    routed, _ = known(monkeypatch)
    tokens, slots = torch.where(routed.ids_TK == 1)
    a_NF = routed.hidden(1, routed.x_TD[tokens])
    p_NF = routed.gates_TK[tokens, slots, None] * a_NF
    expected = solve(p_NF.T @ p_NF, p_NF.T @ routed.lack_TD[tokens], 0.03).T
    torch.testing.assert_close(fit(routed, [1], ridge=0.03, sweeps=1)[1], expected)
