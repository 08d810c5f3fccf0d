"""Experts that run once for the model and for the measure: the model's output stays what it is.

Run: pytest tests/calibration/test_once.py
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from streamed import make_batches, same, streamed_logits
from tiny_models import TINY

import moe_compose as mc
from moe_compose.architectures import find
from moe_compose.calibration import once
from moe_compose.calibration.calls import Call, experts_in, watching
from moe_compose.calibration.once import Once
from moe_compose.calibration.pairs import sizes
from moe_compose.calibration.tokens import TokenSet
from moe_compose.runtime import Layer, Runner

#: Families whose classes are outside of the interface: their experts run a second time.
OUTSIDE = {"dbrx", "longcat_flash"}

#: Families whose experts are not given choices and weights.
ELSEWHERE = {"llama4_text", "jetmoe"}


def measured_logits(source: mc.Checkpoint, dtype: str) -> tuple[list[torch.Tensor], int, int]:
    """Logits of a run whose experts are watched; calls that were seen, and how many ran once."""
    runner = Runner(source, dtype=dtype)
    moe = find(source.config).moe(source.config)
    taken, calls = [], []
    real = Once.take

    def take(self: Once) -> Any:
        found = real(self)
        taken.append(found is not None)
        return found

    def see(call: Call) -> None:
        calls.append(call.pairs(torch.ones(len(call.x_TD), dtype=torch.bool)))

    def on_layer(layer: Layer) -> Any:
        experts = experts_in(layer, moe)
        return None if experts is None else watching(layer, experts, moe, see)

    logits: dict[int, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Once, "take", take)
        runner.run(make_batches(), on_layer=on_layer, logits=logits.__setitem__)
    return [logits[i] for i in sorted(logits)], len(calls), sum(taken)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(TINY.keys() - ELSEWHERE))
def test_the_output_is_that_of_eager_experts(tiny: Any, family: str, dtype: str) -> None:
    source = tiny(family)
    if not find(source.config).is_moe:
        return
    plain = streamed_logits(source, make_batches(), dtype=dtype)
    found, calls, at_once = measured_logits(source, dtype)
    assert same(found, plain)
    assert calls and at_once == (0 if family in OUTSIDE else calls)


def test_the_control_must_fail(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts summed in another order are within rounding, and not the same; the few tokens that
    are tried do not come out the same either, so the class's own forward runs.
    """
    source = tiny("qwen3_moe", num_experts_per_tok=4)
    plain = streamed_logits(source, make_batches())
    rows = once._rows
    monkeypatch.setattr(once, "_rows", lambda *args: reversed(list(rows(*args))))
    found, calls, at_once = measured_logits(source, "float32")
    assert same(found, plain) and calls and not at_once
    monkeypatch.setattr(
        Once, "_agrees", lambda self, own, given: setattr(self, "_sum_in", given[0].dtype) or True
    )
    found, calls, at_once = measured_logits(source, "float32")
    assert not same(found, plain) and calls == at_once


def test_both_ways_measure_the_same(
    tiny: Any, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, options = tiny("gpt_oss"), mc.CalibrateOptions(batch=3)
    at_once = mc.calibrate(source, tokens, options)
    monkeypatch.setattr(Once, "_agrees", lambda self, own, given: False)
    twice = mc.calibrate(source, tokens, options)
    for layer, stats in at_once.layers.items():
        for name, table in stats.tensors.items():
            torch.testing.assert_close(twice.layers[layer].tensors[name], table, rtol=2e-6, atol=0)
    monkeypatch.undo()
    once._say.cache_clear()
    with caplog.at_level(logging.INFO, "moe_compose"):
        mc.calibrate(tiny("dbrx"), tokens, options)
    assert (
        "outside of transformers' experts interface: its experts run a second time" in caplog.text
    )


@pytest.mark.parametrize("width", [7, 32, 96, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_are_exact_to_1e7(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    f_ND = torch.randn(500, width, generator=generator) * 10 ** torch.randn(500, 1)
    f_ND = f_ND.to(dtype)
    norm_N, peak_N = sizes(f_ND)
    exact_N = torch.linalg.vector_norm(f_ND.double(), dim=-1)
    assert float(((norm_N - exact_N) / exact_N).abs().max()) <= 1e-7
    assert torch.equal(peak_N, f_ND.abs().amax(-1).double())
