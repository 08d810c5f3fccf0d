"""The Triton backward in Triton's interpreter, against fp64 autograd of the eager reference.

    pytest tests/kernels/test_backward.py

One process runs the whole matrix (`backward_matrix.py`): gradients of x, the router's weights, the
experts, their biases, and adapters, over the forward's layouts, activations, sizes and routings.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moe_compose.errors import OptionError
from moe_compose.kernels import ExpertLora, ExpertWeights, configs
from moe_compose.kernels.backward_configs import HALF, backward_config_for
from moe_compose.kernels.layout import ExpertLayout, check

SCRIPT = Path(__file__).with_name("backward_matrix.py")
FP32 = 1e-6


def test_fp32_agrees_with_fp64(matrix):
    errors = matrix["fp32"]
    assert len(errors) > 25
    flat = {(case, name): e for case, found in errors.items() for name, e in found.items()}
    assert {key: e for key, e in flat.items() if not e <= FP32} == {}
    names = {name for _, name in flat}
    assert names == {"x", "gates"} | {
        *("gate_up", "down", "gate_up_bias", "down_bias"),
        *("gate_up_a", "gate_up_b", "down_a", "down_b"),
    }


def test_bf16_is_no_worse_than_eager_bf16(matrix):
    for case, found in matrix["bf16"].items():
        limits = {name: 1.5 * e for name, e in found["eager"].items()}
        errors = found["error"]
        assert {name: e for name, e in errors.items() if not e <= limits[name]} == {}, case
        assert errors["x"] > 1e-3 and found["rounded"], "not emulated"


def test_two_runs_give_the_same_bytes(matrix):
    assert matrix["same bytes"]


def test_only_what_is_wanted_is_formed(matrix):
    for what, found in matrix["made"].items():
        assert found["gradients"] == found["wanted"], what
    shapes = {what: {tuple(s) for s in found["matrices"]} for what, found in matrix["made"].items()}
    assert shapes["frozen"] == shapes["gates"] == set()
    assert shapes["adapted"] == {(5, 2, 40), (5, 48, 2), (5, 2, 24), (5, 40, 2)}
    assert shapes["full"] == {(5, 48, 40), (5, 40, 24)}


def test_faults_are_noticed(matrix):
    errors = dict(matrix["controls"])
    assert errors.pop("none") <= FP32
    assert len(errors) > 10
    assert {name: e for name, e in errors.items() if not e > 1000 * FP32} == {}


def test_adapters_of_another_dtype(matrix):
    errors = matrix["another dtype"]
    assert {name: e for name, e in errors.items() if not e <= FP32} == {}


def test_a_training_step_of_tiny_models_is_that_of_eager(matrix):
    errors = matrix["families"]
    assert len(errors) == 3
    assert {n: e for n, e in errors.items() if not max(e["router"], e["embedding"]) <= 2e-6} == {}
    assert {n: e for n, e in errors.items() if not e["all"] <= 1e-5} == {}


@pytest.mark.parametrize("arch", configs.HALF)
def test_the_table_has_an_answer_for_every_layer_of_the_forward(arch):
    for rows in (0, 0.1, 32, 33, 255, 256, 1e6):
        for size in (2, 4):
            for model, width in ((2048, 768), (2880, 2880), (45, 19)):
                assert backward_config_for(arch, rows, size, model, width) is not None
    assert HALF.keys() >= configs.HALF.keys()
    assert backward_config_for("sm_75", 100, 2, 2048, 768) is None


def test_half_a_pair_is_refused():
    with pytest.raises(OptionError, match="down_b is missing"):
        ExpertLora(down_a=torch.zeros(2, 1, 3))


def test_adapters_that_do_not_fit_are_named_at_once():
    weights = ExpertWeights(gate_up=torch.zeros(2, 6, 4), down=torch.zeros(2, 4, 3))
    lora = ExpertLora(
        gate_up_a=torch.zeros(2, 5, 3),
        gate_up_b=torch.zeros(2, 5, 6),
        down_a=torch.zeros(2, 0, 3),
        down_b=torch.zeros(2, 4, 0),
    )
    ids, gates = torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1)
    with pytest.raises(OptionError) as caught:
        check(torch.zeros(7, 4), weights, ExpertLayout(), ids, gates, lora=lora)
    assert len(caught.value.problems) == 3
    assert "gate_up_a must be [2, 5, 4] (got [2, 5, 3])" in str(caught.value)
