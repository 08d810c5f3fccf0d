"""Conditions: the mean over all text, and the worst domain.

pytest tests/recipe/test_conditions.py
"""

from __future__ import annotations

import math

import pytest

from moe_compose.errors import ConditionError
from moe_compose.evaluation.result import DomainScore, Evaluation
from moe_compose.recipe.conditions import compared, held


def score(loss: float, kl: float, top1: float) -> DomainScore:
    return DomainScore(100, 99, loss, loss, kl, top1, 1.0)


def found(**domains: tuple[float, float, float]) -> Evaluation:
    """Domains that count alike."""
    means = [sum(column) / len(domains) for column in zip(*domains.values(), strict=True)]
    return Evaluation(
        checkpoint="result",
        against="source",
        domains={name: score(*figures) for name, figures in domains.items()},
        overall=score(*means),
    )


#: Three domains are as good as new, one is ruined: the mean hides it.
RUINED = found(en=(2.0, 0.01, 0.99), de=(2.0, 0.01, 0.99), py=(6.0, 0.97, 0.4), m=(2.0, 0.01, 0.9))


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"max_kl": 0.3}, True),
        ({"max_kl_worst": 0.3}, False),
        ({"max_kl_worst": 0.97}, True),
        ({"max_loss": 3.0}, True),
        ({"max_loss_worst": 3.0}, False),
        ({"min_top1": 0.8}, True),
        ({"min_top1_worst": 0.8}, False),
        ({"min_top1_worst": 0.4, "max_loss_worst": 6.0}, True),
    ],
)
def test_a_ruined_domain(limits: dict[str, float], holds: bool) -> None:
    if holds:
        assert held(limits, RUINED)
        return
    with pytest.raises(ConditionError) as caught:
        held(limits, RUINED)
    [problem] = caught.value.problems
    assert " py " in problem and caught.value.exit_code == 4


def test_what_is_no_number_does_not_hold() -> None:
    lost = found(a=(math.nan, math.nan, math.nan))
    for limit in ("max_kl", "max_kl_worst", "max_loss", "min_top1", "min_top1_worst"):
        with pytest.raises(ConditionError):
            held({limit: 0.0 if limit.startswith("min") else 1e9}, lost)


def test_a_loss_alone_needs_no_reference() -> None:
    assert not compared({"max_loss": 1.0, "max_loss_worst": 1.0, "data": ()})
    assert compared({"max_kl_worst": 1.0}) and compared({"min_top1": 0.5})
