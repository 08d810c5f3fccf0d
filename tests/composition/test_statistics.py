"""`RouterStats`: experts leave and come without a trace on those that stay.

pytest tests/composition/test_statistics.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.composition.blocks import packed, unpacked
from moe_compose.composition.measure import measure
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.rows import solve
from moe_compose.composition.statistics import STATS_NAME, RouterStats


@pytest.fixture(scope="module")
def stats(
    source: mc.Checkpoint,
    texts: dict[str, TokenSet],
    options: RoutingOptions,
    tmp_path_factory: pytest.TempPathFactory,
) -> RouterStats:
    return measure(source, texts, options, folder=tmp_path_factory.mktemp("stats"))


def test_packing_is_exact() -> None:
    x_TD = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    matrix_DD = x_TD.T @ x_TD
    values_N = packed(matrix_DD)
    assert values_N.shape == (15,)
    assert torch.equal(unpacked(values_N, 5), matrix_DD.triu() + matrix_DD.triu(1).T)
    assert values_N[:5].equal(matrix_DD[0])


def test_an_expert_that_leaves_leaves_nothing(stats: RouterStats, tmp_path: Path) -> None:
    whole = stats.save(tmp_path / "whole")
    path = stats.without("math").save(tmp_path / "less")
    before, after = load_file(whole), load_file(path)
    assert after.keys() == {n for n in before if ".math." not in n}
    assert all(torch.equal(after[n], before[n]) for n in after)
    gone = next(e for e in stats.experts if e.name == "math")
    data = path.read_bytes()
    assert b"math" not in data and gone.text.encode() not in data
    assert gone.text.encode() in whole.read_bytes()
    block = stats.blocks["layers.1.math.second"]
    sums = whole.read_bytes()[block.offset : block.offset + 64]
    assert sums in whole.read_bytes() and sums not in data
    back = RouterStats.load(path).join(stats.select(["math"])).select(stats.names)
    assert back.save(tmp_path / "back").read_bytes() == whole.read_bytes()


def test_solving_needs_the_file_alone(stats: RouterStats, tmp_path: Path) -> None:
    kept = stats.scaled({"py": 2.0}).save(tmp_path)
    found = RouterStats.load(tmp_path)
    assert found.experts == stats.scaled({"py": 2.0}).experts and kept.name == STATS_NAME
    rows, again = solve(stats), solve(found)
    for layer, rows_ED in rows.items():
        assert torch.equal(again[layer][1], 2 * rows_ED[1])
        assert torch.equal(again[layer][2:], rows_ED[2:])
    with safe_open(kept, "pt") as file:
        assert all(file.get_slice(n).get_dtype() == "F32" for n in file.keys())  # noqa: SIM118


def test_what_does_not_belong_together(stats: RouterStats) -> None:
    one, other = stats.select(["py"]), stats.select(["de"])
    assert one.join(other).names == ("py", "de")
    with pytest.raises(mc.OptionError, match=r"(?s)ridge: .*shared: "):
        one.join(replace(other, ridge=0.1, shared="0"))
    with pytest.raises(mc.OptionError, match="py twice"):
        one.join(one)
    with pytest.raises(mc.OptionError, match="no statistics of rust"):
        stats.without("rust")
    with pytest.raises(mc.OptionError, match="no statistics of rust"):
        stats.scaled({"rust": 1.0})


def test_files_that_are_none(stats: RouterStats, tmp_path: Path) -> None:
    with pytest.raises(mc.CheckpointError, match="cannot read"):
        RouterStats.load(tmp_path)
    path = stats.save(tmp_path)
    data = path.read_bytes()
    with pytest.raises(mc.WriteError, match="is read from"):
        RouterStats.load(path).save(tmp_path)
    for wrong in (
        data[:-4],
        data.replace(b'\\"format\\": 1', b'\\"format\\": 9'),
        data.replace(b"layers.0.py.sum", b"layers.0.xx.sum"),
        data.replace(b'\\"tokens\\"', b'\\"tokenz\\"'),
    ):
        assert wrong != data
        path.write_bytes(wrong)
        with pytest.raises(mc.CheckpointError):
            RouterStats.load(path)
