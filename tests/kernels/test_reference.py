"""The eager reference against closed forms and transformers' experts; pytest
tests/kernels/test_reference.py.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k.
"""

import logging
import math
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model

from moe_compose.architectures.routing_form import Routing
from moe_compose.errors import OptionError
from moe_compose.kernels import (
    Choice,
    ExpertLayout,
    ExpertWeights,
    Saliency,
    choose,
    moe_forward,
    register,
    route,
)
from moe_compose.kernels.choice import _say
from moe_compose.kernels.hook import layout_of, weights_of
from moe_compose.kernels.saliency import MEASURES

SIGMOID = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
CLOSED = {
    "silu": lambda z: z * SIGMOID(z),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "relu": lambda z: max(z, 0.0),
    "relu2": lambda z: max(z, 0.0) ** 2,
    "clamped_swiglu": lambda z: z * SIGMOID(1.702 * z),
}


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def scalar_layer(x: float, weights: ExpertWeights, layout: ExpertLayout) -> float:
    ids, gates = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.float64)
    given = torch.tensor([[x]], dtype=torch.float64)
    return moe_forward(given, weights, layout, ids, gates).item()


@pytest.mark.parametrize("activation", CLOSED)
@pytest.mark.parametrize("x", [-2.0, -0.3, 0.4, 3.0])
def test_a_gated_expert_of_width_1_by_hand(activation, x):
    weights = ExpertWeights(
        gate_up=column(0.9, -1.3),
        down=column(1.7),
        gate_up_bias=torch.tensor([[0.1, 0.2]], dtype=torch.float64),
        down_bias=torch.tensor([[-0.5]], dtype=torch.float64),
    )
    up = -1.3 * x + 0.2 + (activation == "clamped_swiglu")
    expected = 1.7 * CLOSED[activation](0.9 * x + 0.1) * up - 0.5
    for interleaved in (False, True):
        layout = ExpertLayout(activation=activation, interleaved=interleaved)
        assert scalar_layer(x, weights, layout) == pytest.approx(expected, rel=1e-14)


def test_a_limit_cuts_the_gate_above_and_the_up_on_both_sides():
    weights = ExpertWeights(gate_up=column(1.0, 2.0), down=column(1.0))
    layout = ExpertLayout(activation="relu", limit=1.5)
    assert [scalar_layer(x, weights, layout) for x in (0.5, 1.0, 4.0)] == [0.5, 1.5, 2.25]
    down = ExpertWeights(gate_up=column(1.0, -1.0), down=column(1.0))
    assert scalar_layer(4.0, down, layout) == -2.25


def random_layer(tokens=19, model=6, width=5, experts=4, top_k=2):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = ExpertWeights(
        gate_up=draw(experts, 2 * width, model),
        down=draw(experts, model, width),
        gate_up_bias=draw(experts, 2 * width),
        down_bias=draw(experts, model),
    )
    ids = draw(tokens, experts).argsort(-1)[:, :top_k]
    return draw(tokens, model), weights, ExpertLayout(), ids, draw(tokens, top_k).abs()


def test_layouts_are_the_same_numbers_in_another_order():
    x, weights, _, ids, gates = random_layer()
    y = moe_forward(x, weights, ExpertLayout(), ids, gates)
    halves = torch.arange(10).reshape(2, 5).T.flatten()
    woven = ExpertWeights(
        gate_up=weights.gate_up[:, halves],
        down=weights.down,
        gate_up_bias=weights.gate_up_bias[:, halves],
        down_bias=weights.down_bias,
    )
    turned = ExpertWeights(
        gate_up=woven.gate_up.mT,
        down=woven.down.mT,
        gate_up_bias=woven.gate_up_bias,
        down_bias=woven.down_bias,
    )
    again = moe_forward(x, woven, ExpertLayout(interleaved=True), ids, gates)
    torch.testing.assert_close(again, y)
    both = ExpertLayout(interleaved=True, transposed=True)
    torch.testing.assert_close(moe_forward(x, turned, both, ids, gates), y)
    assert not torch.allclose(moe_forward(x, woven, ExpertLayout(), ids, gates), y)


def test_saliency_sums_over_the_routed_pairs_and_over_calls():
    x, weights, layout, ids, gates = random_layer()
    saliency = Saliency.zeros(4)
    for part in (slice(0, 7), slice(7, None)):
        moe_forward(x[part], weights, layout, ids[part], gates[part], saliency=saliency)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for t, row in enumerate(ids.tolist()):
        for e, g in zip(row, gates[t].tolist(), strict=True):
            alone = torch.tensor([[e]]), torch.ones(1, 1, dtype=torch.float64)
            f = moe_forward(x[t : t + 1], weights, layout, *alone).norm().item()
            expected[:5, e] += torch.tensor([1, g, f, f * f, g * f], dtype=torch.float64)
            expected[5, e] = max(expected[5, e], f)
    torch.testing.assert_close(saliency.table_6E, expected)
    assert saliency["count"].sum() == ids.numel() and MEASURES[0] == "count"


def test_ids_outside_the_experts_count_for_nothing():
    x, weights, layout, ids, gates = random_layer()
    dropped, zeroed, saliency = ids.clone(), gates.clone(), Saliency.zeros(4)
    dropped[::3, 0], dropped[1, 1], zeroed[::3, 0], zeroed[1, 1] = 4, -1, 0, 0
    y = moe_forward(x, weights, layout, dropped, gates, saliency=saliency)
    torch.testing.assert_close(y, moe_forward(x, weights, layout, ids, zeroed))
    assert saliency["count"].sum() == ids.numel() - 8


def test_gradients_pass_through_the_reference():
    x, weights, layout, ids, gates = random_layer(tokens=3)
    inputs = (x.requires_grad_(), gates.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, gates: moe_forward(x, weights, layout, ids, gates), inputs
    )


def experts_of(family: str) -> torch.nn.Module:
    model = tiny_model(family, dtype=torch.float64)
    return next(m for m in model.modules() if hasattr(m, "is_concatenated"))


FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v3", "gpt_oss",
    "glm4_moe", "nemotron_h", "gemma4_text", "aria_text", "phimoe", "deepseek_v4",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_experts(family):
    module = experts_of(family)
    layout, weights = layout_of(module), weights_of(module)
    model, _ = weights.sizes(layout)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in weights.tensors:
            tensor.normal_(generator=generator)
    x = torch.randn(21, model, generator=generator, dtype=torch.float64)
    scores = torch.rand(21, weights.experts, generator=generator, dtype=torch.float64)
    gates, ids = scores.topk(2)
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        theirs = module(x, ids, gates)
        ours = moe_forward(x, weights, layout, ids, gates)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_every_fault_of_a_layer_is_named_at_once():
    x, weights, layout, ids, gates = random_layer()
    wrong = ExpertWeights(gate_up=weights.gate_up.mT, down=weights.down)
    with pytest.raises(OptionError) as caught:
        moe_forward(x[:, :5], wrong, layout, ids, gates[:4], saliency=Saliency.zeros(5))
    assert len(caught.value.problems) == 4
    assert "gate_up must be [4, 10, 6] beside this down (got [4, 6, 10])" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swish"},
        {"gated": False, "interleaved": True},
        {"gated": False, "activation": "clamped_swiglu"},
        {"gated": False, "limit": 7.0},
        {"limit": 0.0},
    ],
)
def test_layouts_that_no_formula_describes_are_refused(options):
    with pytest.raises(OptionError):
        ExpertLayout(**options)


def test_the_choice_says_why(caplog):
    x, weights, layout, ids, gates = random_layer()
    reason = "the tensors are on the CPU; fp64 is for the reference"
    assert choose(x, weights) == Choice(implementation="eager", reason=reason)
    with pytest.raises(OptionError, match="fp64 is for the reference"):
        choose(x, weights, implementation="triton")
    _say.cache_clear()
    with caplog.at_level(logging.INFO, logger="moe_compose"):
        for _ in range(2):
            moe_forward(x, weights, layout, ids, gates)
    assert caplog.messages == [f"experts run with eager: {reason}"]


def test_triton_is_imported_when_it_is_used():
    code = "import sys, moe_compose.kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_and_ids_that_mean_nothing_are_refused():
    x, weights, layout, ids, gates = random_layer()
    with pytest.raises(OptionError, match=r"implementation \('cuda'\) is none of"):
        moe_forward(x, weights, layout, ids, gates, implementation="cuda")
    with pytest.raises(OptionError, match="none of"):
        route(gates, Routing(score="softmax"), 1, implementation="cuda")
    with pytest.raises(OptionError, match="none of"):
        register(implementation="cuda")
    with pytest.raises(OptionError, match="experts must be integers"):
        moe_forward(x, weights, layout, ids.float(), gates)
