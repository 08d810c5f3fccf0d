"""Rows from sums against closed forms; plans that have them; all of it together.

pytest tests/composition/test_rows.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutants import mutant
from pruned import lively_checkpoint, raw
from torch import Tensor

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.composition.initialise import route_by_text
from moe_compose.composition.kept import SEARCH_NAME
from moe_compose.composition.measure import measure
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.rows import solve, with_rows
from moe_compose.composition.search import SCALES
from moe_compose.composition.statistics import RouterStats

GATE = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def stats(
    source: mc.Checkpoint,
    texts: dict[str, TokenSet],
    options: RoutingOptions,
    tmp_path_factory: pytest.TempPathFactory,
) -> RouterStats:
    return measure(source, texts, options, folder=tmp_path_factory.mktemp("stats"))


def test_ridge_is_the_closed_form(stats: RouterStats) -> None:
    names = [e.name for e in stats.experts if e.tokens]
    for layer, width in stats.widths.items():
        a = sum(stats.second(layer, n).numpy() for n in names)
        b = np.stack([stats.sum(layer, n).numpy() for n in names], 1)
        centred, penalty = b - b.mean(1, keepdims=True), 0.01 * np.trace(a) / width
        w = np.linalg.inv(a + penalty * np.eye(width)) @ centred
        found = solve(stats)[layer].numpy()
        np.testing.assert_allclose(found[1:], (w / np.linalg.norm(w, axis=0)).T, rtol=1e-8)
        assert not found[0].any()
        # the control: targets that are not centred
        plain = np.linalg.inv(a + penalty * np.eye(width)) @ b
        assert np.abs(found[1:] - (plain / np.linalg.norm(plain, axis=0)).T).max() > 0.01


def test_hidden_is_the_mean(stats: RouterStats) -> None:
    rows = solve(replace(stats, method="hidden").scaled({"de": 4.0}))
    for layer, rows_ED in rows.items():
        for i, (name, length) in enumerate((("py", 1.0), ("math", 1.0), ("de", 4.0)), 1):
            mean_D = stats.sum(layer, name) / stats.experts[i].tokens
            expected = length * mean_D / mean_D.norm()
            torch.testing.assert_close(rows_ED[i], expected)
        assert not rows_ED[0].any()


def test_no_text_no_rows(stats: RouterStats) -> None:
    with pytest.raises(mc.OptionError, match="no expert has text"):
        solve(stats.select(["base"]))


def test_rows_take_their_places(source: mc.Checkpoint, stats: RouterStats, tmp_path: Path) -> None:
    rows = solve(stats)
    plan = with_rows(source, rows)
    one = with_rows(source, rows, only=[2], folder=tmp_path / "changed")
    for layer, rows_ED in rows.items():
        name = GATE.format(layer)
        assert torch.equal(plan.read(name), rows_ED.float())
        expected = source.read(name)
        expected[2] = rows_ED[2].float()
        assert torch.equal(one.read(name), expected)
    for other in source.tensors:
        if "gate.weight" not in other:
            assert raw(plan, other) == raw(one, other) == raw(source, other)
    written = mc.write(one, tmp_path / "out")
    assert written.config == source.config
    assert all(torch.equal(written.read(n), one.read(n)) for n in written.tensors)


def test_rows_of_their_dtype_biases_as_they_are(
    texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    """Routers of gpt-oss are bf16 here, and have biases."""
    made = lively_checkpoint("gpt_oss", tmp_path / "tiny")

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({n: t.bfloat16() for n, t in tensors.items()})

    source = mutant(made, tmp_path / "bf16", tensors=narrow)
    rows = solve(measure(source, {0: texts["py"], 1: texts["de"]}, options, folder=tmp_path))
    plan = with_rows(source, rows)
    for layer, rows_ED in rows.items():
        at = f"model.layers.{layer}.mlp.router."
        assert torch.equal(plan.read(f"{at}weight"), rows_ED.bfloat16())
        assert raw(plan, f"{at}bias") == raw(source, f"{at}bias")


def test_rows_that_do_not_fit(source: mc.Checkpoint, stats: RouterStats, tmp_path: Path) -> None:
    rows = solve(stats)
    wrong = {0: rows[0], 1: rows[1][:3], 7: rows[2]}
    with pytest.raises(mc.OptionError, match=r"(?s)layers \[0, 1, 7\].*layer 1: rows \[3, "):
        with_rows(source, wrong)
    with pytest.raises(mc.OptionError, match="experts must be 0 to 3"):
        with_rows(source, rows, only=[4])
    with pytest.raises(mc.OptionError, match="no expert is named"):
        with_rows(source, rows, only=[])
    with pytest.raises(mc.CheckpointError, match="NaN"):
        with_rows(source, {**rows, 1: rows[1] * float("nan")})

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "gate.weight" in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    narrow = mutant(source, tmp_path / "fp8", tensors=quantise)
    with pytest.raises(mc.UnsupportedError, match="F8_E4M3"):
        with_rows(narrow, rows)


def test_all_of_it(
    source: mc.Checkpoint, texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    plan, stats = route_by_text(
        source, texts, options, folder=tmp_path, progress=lambda *p: told.append(p)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    found = plan.reports[SEARCH_NAME]
    assert {e.scale for e in stats.experts} == {found["chosen"]} and found["chosen"] in SCALES
    assert list(found["tokens"]) == ["py", "math", "de"]
    for name, own in texts.items():
        expert = next(e for e in stats.experts if e.name == name)
        assert expert.tokens + found["tokens"][name] == sum(own.tokens.values())
    for layer, rows_ED in solve(stats).items():
        assert torch.equal(plan.read(GATE.format(layer)), rows_ED.float())
    assert "base without text" in plan.notes[0]
    fixed = replace(options, row_scale=4.0, method="hidden")
    plain, whole = route_by_text(source, texts, fixed, folder=tmp_path / "fixed")
    said = {"data": [], "text_tokens": fixed.tokens, "row_scale": 4.0}
    assert SEARCH_NAME not in plain.reports and plain.options == said
    assert whole.method == "hidden" and {e.scale for e in whole.experts} == {4.0}
    assert whole.experts[1].tokens == sum(texts["py"].tokens.values())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ridge": 0.0}, "ridge"),
        ({"row_scale": -1.0}, "row_scale"),
        ({"held_out": 1, "tokens": 1}, r"(?s)tokens.*held_out"),
        ({"method": "mean"}, "none of ridge, hidden"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_options(given: dict[str, Any], why: str) -> None:
    with pytest.raises(mc.OptionError, match=why):
        RoutingOptions(**given)
