"""The Triton kernels in Triton's interpreter, against the reference in fp64.

    pytest tests/kernels/test_triton.py

One process runs the whole matrix (`interpreter_matrix.py`): every layout, every activation, odd
sizes, 1 to 130 experts, k from 1 to all, empty experts, a hot one, dropped ids, one token and none.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("interpreter_matrix.py")
FP32 = 2e-6


def test_fp32_agrees_with_fp64(matrix):
    errors = matrix["fp32"]
    assert len(errors) > 25
    assert {name: e for name, e in errors.items() if not e["error"] <= FP32} == {}


def test_saliency_agrees_with_fp64(matrix):
    errors = matrix["fp32"]
    assert {name: e for name, e in errors.items() if not e["saliency"] <= FP32} == {}


def test_bf16_is_no_worse_than_eager_bf16(matrix):
    errors = matrix["bf16"]
    worse = {name: e for name, e in errors.items() if not e["error"] <= 1.5 * e["eager"]}
    assert worse == {}
    assert all(e["rounded"] for e in errors.values())
    assert sum(e["error"] > 1e-3 for e in errors.values()) >= len(errors) - 1, "not emulated"


def test_two_runs_give_the_same_bytes(matrix):
    assert all(matrix["same bytes"].values())


def test_faults_are_noticed(matrix):
    assert {name: e for name, e in matrix["controls"].items() if not e > 1000 * FP32} == {}


def test_the_sort_is_stable_and_the_schedule_covers_every_row_once(matrix):
    assert {name for name, holds in matrix["sorting"].items() if not holds} == set()


def test_tiny_models_give_the_logits_of_eager(matrix):
    errors = matrix["families"]
    assert len(errors) >= 8
    assert {name: e for name, e in errors.items() if not e <= 1e-6} == {}
