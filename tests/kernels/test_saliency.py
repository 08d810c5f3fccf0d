"""Saliency without output, and shared out; pytest tests/kernels/test_saliency.py.

The kernels run in a process of their own (`saliency_matrix.py`).
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compose.errors import OptionError
from moe_compose.kernels import ExpertLayout, ExpertWeights, Saliency, moe_forward, moe_saliency
from moe_compose.kernels import reference as eager

SCRIPT = Path(__file__).with_name("saliency_matrix.py")


def test_sums_agree_with_fp64(matrix):
    assert {n: t for n, t in matrix["tables"].items() if not t["error"] <= 2e-6} == {}
    assert {n: t for n, t in matrix["tables"].items() if not t["eager"] <= 1e-12} == {}


def test_sums_are_the_same_with_and_without_output_and_in_every_run(matrix):
    for name, table in matrix["tables"].items():
        assert table["same without output"] and table["same again"], name


def test_no_output_is_stored(matrix):
    """T·D is 24576 and P·D 49152."""
    assert matrix["alone"] < 24576 and matrix["beside"] == 49152


def layer(tokens=96, model=64, width=8, experts=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    weights = ExpertWeights(
        gate_up=draw(experts, 2 * width, model), down=draw(experts, model, width)
    )
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :2]
    return draw(tokens, model), weights, ExpertLayout(), ids, draw(tokens, 2).abs()


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_few_rows_at_a_time(implementation, monkeypatch):
    from moe_compose.kernels import grouped

    monkeypatch.setattr(eager, "_ROWS", 10)
    monkeypatch.setattr(grouped, "_TOKENS", 10)
    given, expected, alone = layer(), Saliency.zeros(4), Saliency.zeros(4)
    moe_forward(*given, saliency=expected, implementation="eager")
    with Largest() as seen:
        assert moe_saliency(*given, alone, implementation=implementation) is None
    assert seen.elements < 96 * 64
    torch.testing.assert_close(alone.table_6E, expected.table_6E, rtol=1e-6, atol=0)


def test_gradients_are_not_wanted():
    x, *rest = layer()
    saliency = Saliency.zeros(4)
    moe_saliency(x.requires_grad_(), *rest, saliency)
    assert not saliency.table_6E.requires_grad and saliency["count"].sum() == 192


def test_a_table_for_other_experts_is_refused():
    for implementation in ("eager", "grouped_mm", "auto"):
        with pytest.raises(OptionError, match=r"saliency \(\[6, 5\], cpu\) must be"):
            moe_saliency(*layer(), Saliency.zeros(5), implementation=implementation)
