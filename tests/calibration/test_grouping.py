"""Groups by hand-made similarities, and in the router's own groups; and neurons found again. What
other people's code makes of the same statistics is in test_oracle.py.

Run: pytest tests/calibration/test_grouping.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from merged import measured
from pruned import lively_checkpoint

import moe_compose as mc
from moe_compose.calibration.alignment import activation_cost, match, principal, weight_cost
from moe_compose.calibration.grouping import (
    best_first,
    group_experts,
    hc_smoe,
    m_smoe,
    ream,
    similarity_of,
)
from moe_compose.surgery.selection import moe_form


def test_hierarchical_clustering() -> None:
    """Average linkage by hand: 0 and 1 at 1, then 2 with 3 at 2, then both at 10."""
    mean = torch.tensor([[0.0], [1.0], [10.0], [12.0], [40.0]])
    count = torch.tensor([1.0, 5.0, 2.0, 2.0, 0.0])
    assert hc_smoe(mean, count, 5) == [[e] for e in range(5)]
    assert sorted(hc_smoe(mean, count, 3)) == [[1, 0], [2, 3], [4]]
    assert sorted(hc_smoe(mean, count, 2)) == [[1, 2, 3, 0], [4]]
    equal = torch.zeros(4, 2)
    assert len(hc_smoe(equal, torch.zeros(4), 2)) == 2  # a cut by distance would give one


def test_the_most_frequent_dominate() -> None:
    alike = torch.eye(4)
    alike[1, 0], alike[1, 3], alike[2, 0], alike[2, 3] = 0.2, 0.6, 0.5, 0.5
    count = torch.tensor([9.0, 1.0, 1.0, 9.0])
    assert m_smoe(alike, count, 2) == [[0, 2], [3, 1]]  # the tie of 2 goes to 0


def test_the_most_salient_take_those_nearest() -> None:
    alike = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.1]] * 5)
    worth = torch.tensor([5.0, 1.0, 1.0, 1.0, 4.0])
    assert ream(alike, worth, 2, 3) == [[0, 1, 2], [4, 3]]
    assert ream(alike, worth, 2, 16) == [[0, 1, 2, 3], [4]]
    with pytest.raises(mc.OptionError, match="cannot hold 5 experts"):
        ream(alike, worth, 2, 2)
    assert best_first(torch.tensor([0.0, 2.0, 0.0])) == [1, 0, 2]


def test_weights_and_order() -> None:
    groups = mc.ExpertGroups.of([[3, 0], [1], [2, 4, 5]], [1, 9, 0, 3, 0, 0])
    assert groups.members == ((1,), (2, 4, 5), (3, 0))
    assert groups.weights == ((1.0,), (1 / 3, 1 / 3, 1 / 3), (0.75, 0.25))
    assert groups.labels == (2, 0, 1, 2, 1, 1)
    assert groups.representatives == (1, 2, 3)
    assert not list(groups.problems(6))
    assert list(mc.ExpertGroups(((0, 1),), ((0.5, 0.4),)).problems(2))
    assert list(mc.ExpertGroups(((0, 1),), ((0.5, 0.5),)).problems(3))


def test_within_the_groups_of_the_router(tmp_path: Path) -> None:
    source = lively_checkpoint("deepseek_v3", tmp_path / "tiny")
    stats = measured(source, tmp_path / "stats")
    _, moe = moe_form(source)
    for method in ("hc-smoe", "m-smoe", "ream"):
        found = group_experts(stats, mc.MergeOptions(keep=6, method=method), moe)
        again = group_experts(stats, mc.MergeOptions(keep=6, method=method), moe)
        assert found == again
        for groups in found.layers.values():
            assert not list(groups.problems(8))
            assert all(len({e // 4 for e in g}) == 1 for g in groups.members)
            assert [e < 4 for e in groups.representatives] == [True] * 3 + [False] * 3


def test_similarity_is_between_0_and_1(tmp_path: Path) -> None:
    source = lively_checkpoint("longcat_flash", tmp_path / "tiny")  # its router has more rows
    stats = measured(source, tmp_path / "stats")
    for layer in stats.layers:
        alike = similarity_of(stats.similarity(layer))
        assert alike.shape == (6, 6)
        assert float(alike.min()) >= 0
        torch.testing.assert_close(alike.diagonal(), torch.ones(6).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_shuffled_neurons_are_found_again(by: str) -> None:
    """All of them, under noise of a tenth of the weights; and chance finds next to none."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a_FP, a_FS = normal(200, 300), normal(200, 32)
    shuffle = torch.randperm(200, generator=generator)
    b_FP = a_FP[shuffle] + 0.1 * normal(200, 300)
    b_FS = a_FS[shuffle] + 0.1 * normal(200, 32)
    cost = weight_cost(a_FP, b_FP) if by == "weights" else activation_cost(a_FS, b_FS, a_FP, b_FP)
    found = torch.tensor(match(cost))
    assert torch.equal(shuffle[found], torch.arange(200))
    other = torch.tensor(match(weight_cost(a_FP, normal(200, 300))))
    assert (shuffle[other] == torch.arange(200)).float().mean() < 0.1


def test_principal_components() -> None:
    """Those of an exact decomposition, up to sign; twice the same."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 500, generator=generator)
    x = torch.randn(300, 8, generator=generator) @ basis
    x += 0.01 * torch.randn(300, 500, generator=generator)
    found = principal(x, 8)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = u[:, :8] * s[:8]
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    torch.testing.assert_close(
        torch.cdist(found, found, **exact), torch.cdist(expected, expected, **exact),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert torch.equal(found, principal(x, 8))


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(mc.UnsupportedError, match=r"moe-compose\[merge\]"):
        hc_smoe(torch.zeros(3, 2), torch.zeros(3), 2)


def test_without_similarities(tmp_path: Path) -> None:
    from merged import tokens

    source = lively_checkpoint("mixtral", tmp_path / "tiny")
    stats = mc.calibrate(source, tokens())
    with pytest.raises(mc.OptionError, match="--similarity"):
        mc.merge(source, stats, mc.MergeOptions(keep=3))
