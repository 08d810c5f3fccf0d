"""The experts by torch's `grouped_mm`, against the reference in fp64; pytest
tests/kernels/test_grouped.py.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k.
"""

import itertools
import logging

import pytest
import torch
from tiny_models import tiny_model

from moe_compose.errors import OptionError
from moe_compose.kernels import (
    Choice,
    ExpertLayout,
    ExpertLora,
    ExpertWeights,
    Saliency,
    choose,
    grouped,
    hook,
    moe_forward,
    reference,
)
from moe_compose.kernels.choice import _say
from moe_compose.kernels.layout import ACTIVATIONS

T, D, F, E, K = 37, 24, 40, 5, 2
RANK = 8
FP32 = 2e-6


def draw(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def build(layout: ExpertLayout, *, bias: bool = False, routing: str = "random", tokens: int = T):
    random = draw(ACTIVATIONS.index(layout.activation) + 10 * layout.transposed)
    fused = F * (2 if layout.gated else 1)
    first, second = random(E, fused, D), random(E, D, F)
    if layout.transposed:
        first, second = first.mT.contiguous(), second.mT.contiguous()
    weights = ExpertWeights(
        gate_up=first,
        down=second,
        gate_up_bias=random(E, fused) if bias else None,
        down_bias=random(E, D) if bias else None,
    )
    ids = random(tokens, E).argsort(-1)[:, :K]
    if routing == "dropped":
        ids[::3, 0], ids[1::4, 1], ids[5:6] = E, -1, 1000
    if routing == "all dropped":
        ids[:] = E
    if routing == "one expert has all":
        ids[:, 0] = 3
    return 4 * random(tokens, D), weights, layout, ids, random(tokens, K).abs()


def lora() -> ExpertLora:
    random = draw(99)
    return ExpertLora(
        gate_up_a=random(E, RANK, D),
        gate_up_b=random(E, 2 * F, RANK),
        down_a=random(E, RANK, F),
        down_b=random(E, D, RANK),
        scale=0.7,
    )


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    ours, exact = ours.double(), exact.double()
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - exact).norm() / (exact.norm() or 1.0))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """So that what `grouped_mm` leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


LAYOUTS = [
    ExpertLayout(interleaved=i, transposed=t, activation=a, limit=0.7 if i else None)
    for a, i, t in itertools.product(ACTIVATIONS, (False, True), (False, True))
] + [
    ExpertLayout(gated=False, transposed=t, activation=a)
    for a, t in itertools.product(("relu2", "silu"), (False, True))
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout, bias):
    layer = build(layout, bias=bias)
    exact_sums, sums = Saliency.zeros(E), Saliency.zeros(E)
    exact = reference.moe_forward(*layer, dtype=torch.float64, saliency=exact_sums)
    ours = grouped.moe_forward(*layer, saliency=sums)
    assert ours.dtype == torch.float32 and error(ours, exact) <= FP32
    for row, exact_row in zip(sums.table_6E, exact_sums.table_6E, strict=True):
        assert error(row, exact_row) <= FP32


@pytest.mark.parametrize("routing", ["dropped", "all dropped", "one expert has all"])
def test_every_routing_and_no_gradient_from_what_is_dropped(routing):
    x, weights, layout, ids, gates = build(ExpertLayout(), bias=True, routing=routing)
    gradients = []
    for function, wide in ((grouped.moe_forward, False), (reference.moe_forward, True)):
        given = [t.double() if wide else t.clone() for t in (x, gates, *weights.tensors)]
        leaves = [t.detach().requires_grad_() for t in given]
        names = ("gate_up", "down", "gate_up_bias", "down_bias")
        experts = ExpertWeights(**dict(zip(names, leaves[2:], strict=True)))
        sums = Saliency.zeros(E)
        y = function(leaves[0], experts, layout, ids, leaves[1], saliency=sums)
        if y.requires_grad:  # the reference's zeros do not
            (y * draw(7)(*y.shape).to(y.dtype)).sum().backward()
        gradients.append([y.detach(), sums.table_6E, *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*gradients, strict=True):
        if exact is None:  # the reference has not touched it
            assert not ours.any()
        else:
            assert error(ours, exact) <= FP32


def test_low_rank_additions_and_their_gradients():
    layer = build(ExpertLayout(interleaved=True), bias=True, routing="dropped")
    gradients = []
    for function, wide in ((grouped.moe_forward, False), (reference.moe_forward, True)):
        added = lora().map(lambda t, wide=wide: (t.double() if wide else t).requires_grad_())
        dtype = torch.float64 if wide else None
        y = function(*layer, dtype=dtype, lora=added)
        y.square().sum().backward()
        gradients.append([y.detach(), *(t.grad for t in added.tensors)])
    assert all(error(ours, exact) <= FP32 for ours, exact in zip(*gradients, strict=True))


def test_bf16_is_no_worse_than_eager_bf16():
    x, weights, layout, ids, gates = build(ExpertLayout())
    half = ExpertWeights(gate_up=weights.gate_up.bfloat16(), down=weights.down.bfloat16())
    layer = (x.bfloat16(), half, layout, ids, gates)
    exact = reference.moe_forward(*layer, dtype=torch.float64)
    eager = error(reference.moe_forward(*layer), exact)
    assert 1e-3 < error(grouped.moe_forward(*layer), exact) <= 1.5 * eager
    assert grouped.moe_forward(*layer, dtype=torch.float32).dtype == torch.float32


def test_no_token():
    assert grouped.moe_forward(*build(ExpertLayout(), tokens=0)).shape == (0, D)


def test_faults_are_noticed():
    x, weights, layout, ids, gates = build(ExpertLayout(), bias=True)
    exact = reference.moe_forward(x, weights, layout, ids, gates, dtype=torch.float64)
    others = (
        (weights, layout, ids.flip(1), gates),
        (weights, ExpertLayout(interleaved=True), ids, gates),
        (weights, ExpertLayout(activation="gelu"), ids, gates),
        (weights, layout, torch.where(ids == 3, E, ids), gates),
        (ExpertWeights(gate_up=weights.gate_up, down=weights.down), layout, ids, gates),
    )
    for other in others:
        assert error(grouped.moe_forward(x, *other), exact) > 1000 * FP32


def test_auto_takes_it_on_the_cpu_and_says_why(caplog):
    layer = build(ExpertLayout())
    x, weights = layer[:2]
    reason = "the tensors are on the CPU"
    assert choose(x, weights) == Choice(implementation="grouped_mm", reason=reason)
    _say.cache_clear()
    with caplog.at_level(logging.INFO, logger="moe_compose"):
        for _ in range(2):
            moe_forward(*layer)
    assert caplog.messages == [f"experts run with grouped_mm: {reason}"]


def odd(size: int) -> ExpertWeights:
    return ExpertWeights(gate_up=torch.zeros(E, 2 * F, size), down=torch.zeros(E, size, F))


def shifted() -> ExpertWeights:
    flat = torch.zeros(E * 2 * F * D + 1)[1:]
    return ExpertWeights(gate_up=flat.view(E, 2 * F, D), down=torch.zeros(E, D, F))


@pytest.mark.parametrize(
    ("x", "weights", "options", "said"),
    [
        (torch.zeros(1, 26), odd(26), {}, "multiples of 4 elements, and a matrix is 80 × 26"),
        (torch.zeros(1, D), shifted(), {}, "grouped_mm needs multiples of 4 elements"),
        (torch.zeros(1, D).double(), odd(D), {}, "fp64 is for the reference"),
        (torch.zeros(1, D), odd(D), {"dtype": torch.float64}, "fp64 is for the reference"),
        (torch.zeros(1, D).bfloat16(), odd(D), {}, "tokens are torch.bfloat16 and experts"),
        (torch.zeros(1, D).long(), odd(D), {}, "grouped_mm does not take torch.int64"),
        (torch.zeros(1, D, device="meta"), odd(D), {}, "grouped_mm was not tried on meta"),
        (
            torch.zeros(1, D),
            odd(D),
            {"lora": ExpertLora(down_a=torch.zeros(E, 3, F), down_b=torch.zeros(E, D, 3))},
            "and a matrix is 3 × 40",
        ),
    ],
)
def test_what_it_cannot_run_is_eager_or_an_error(x, weights, options, said):
    choice = choose(x, weights, **options)
    assert choice.implementation == "eager" and said in choice.reason
    with pytest.raises(OptionError, match="grouped_mm cannot run this layer") as caught:
        choose(x, weights, implementation="grouped_mm", **options)
    assert said in str(caught.value)


def test_an_older_torch_has_it_under_another_name(monkeypatch):
    layer = build(ExpertLayout())
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert grouped._function() == (torch._grouped_mm, (torch.bfloat16,))
    assert grouped.obstacle(*layer[:2]) == "grouped_mm does not take torch.float32"
    monkeypatch.delattr(torch, "_grouped_mm")
    assert "has no grouped_mm" in grouped.obstacle(*layer[:2])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_known_layouts_do_not_go_to_transformers(family, caplog):
    torch.use_deterministic_algorithms(False)  # in models, it is none of our business
    tokens = torch.arange(3, 15)[None]
    model = tiny_model(family)
    name = hook.register()
    _say.cache_clear()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="moe_compose"):
        model.set_experts_implementation("eager")
        eager = model(tokens).logits
        model.set_experts_implementation(name)
        assert error(model(tokens).logits, eager) <= 1e-6
    assert caplog.messages == ["experts run with grouped_mm: the tensors are on the CPU"]
