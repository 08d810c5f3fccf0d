"""The router's kernels in Triton's interpreter, against the routing reference in fp64.

    pytest tests/kernels/test_router.py

One process runs the whole matrix (`router_matrix.py`): every score and what it may add, 1 to 384
experts, k from 1 to 70, groups, ties, NaN and −inf, and the scheme of every family.
"""

import logging
from pathlib import Path

import pytest
import torch

from moe_compose import routing as reference
from moe_compose.architectures.routing_form import Routing
from moe_compose.errors import OptionError
from moe_compose.kernels import router

SCRIPT = Path(__file__).with_name("router_matrix.py")
SOFTMAX = Routing(score="softmax")


@pytest.mark.parametrize("part", ["cases", "families"])
def test_experts_are_those_of_the_reference(matrix, part):
    errors = matrix[part]
    assert len(errors) > {"cases": 100, "families": 40}[part]
    assert {name for name, e in errors.items() if not e["experts"]} == set()


@pytest.mark.parametrize("part", ["cases", "families"])
@pytest.mark.parametrize(("what", "bound"), [("weights", 2e-6), ("gradient", 1e-6)])
def test_agrees_with_fp64(matrix, part, what, bound):
    errors = {name: e[what] for name, e in matrix[part].items()}
    assert {name: e for name, e in errors.items() if not e <= bound} == {}


def test_scores_that_saturate_are_ties(matrix):
    assert matrix["saturated"]


def test_faults_are_noticed(matrix):
    controls = dict(matrix["controls"])
    assert controls.pop("no fault") <= 2e-6
    assert {name: e for name, e in controls.items() if not e > 1e-2} == {}


def test_on_the_cpu_it_is_the_reference_and_says_so(caplog):
    logits_TE = torch.randn(5, 8, requires_grad=True)
    router._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="moe_compose"):
        for _ in range(2):
            routed = router.route(logits_TE, SOFTMAX, 2)
    expected = reference.route(logits_TE, SOFTMAX, 2)
    assert torch.equal(routed.weights_TK, expected.weights_TK) and routed.weights_TK.requires_grad
    assert caplog.messages == ["routers run with eager: the logits are on the CPU"]


@pytest.mark.parametrize(
    ("logits", "routing", "options", "said"),
    [
        (torch.zeros(5, 8).double(), SOFTMAX, {}, "fp64 is for the reference"),
        (torch.zeros(5, 8).long(), SOFTMAX, {}, "no kernel for torch.int64"),
        (
            torch.zeros(5, 8),
            Routing(score="softmax", renormalise=True, norm_p=0.5),
            {},
            "the 0.5-norm is for the reference",
        ),
        (
            torch.zeros(5, 8),
            Routing(score="softmax", expert_scale=True),
            {"expert_scale_E": torch.ones(8, requires_grad=True)},
            "the expert scale wants a gradient",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_said(logits, routing, options, said):
    pytest.importorskip("triton")
    with pytest.raises(OptionError, match=said):
        router.route(logits, routing, 2, implementation="triton", **options)


def test_faults_are_those_of_the_reference():
    for implementation in ("auto", "eager"):
        with pytest.raises(OptionError, match=r"top_k \(9\) must lie in 1..8"):
            router.route(torch.zeros(5, 8), SOFTMAX, 9, implementation=implementation)
