"""Runs that are interrupted, statistics on disk and in memory, similarities, refusals.

Run: pytest tests/calibration/test_run.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutant
from toy_source import contents

import moe_compose as mc
from moe_compose.calibration import files
from moe_compose.calibration.criteria import CRITERIA, kendall_tau, worth
from moe_compose.calibration.stats import add_all
from moe_compose.calibration.tokens import TokenSet
from moe_compose.errors import CheckpointError, OptionError, UnsupportedError, WriteError

OPTIONS = mc.CalibrateOptions(batch=3, similarity=True, sample=20)


@pytest.fixture(scope="module")
def source(tiny: Any) -> mc.Checkpoint:
    return tiny("qwen3_moe", decoder_sparse_step=1)


@pytest.fixture(scope="module")
def whole(source: mc.Checkpoint, tokens: TokenSet, tmp_path_factory: Any) -> mc.ExpertStats:
    return mc.calibrate(source, tokens, OPTIONS, output=tmp_path_factory.mktemp("x") / "whole")


class StopError(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("at", [1, 4, 8])
def test_an_interrupted_run_continues_to_the_same_bytes(
    source: mc.Checkpoint, tokens: TokenSet, whole: mc.ExpertStats, tmp_path: Path, at: int
) -> None:
    told = []

    def stop(p: Any) -> None:
        told.append(p)
        if len(told) == at:
            raise StopError

    place = tmp_path / "stats"
    with pytest.raises(StopError):
        mc.calibrate(source, tokens, OPTIONS, output=place, progress=stop)
    assert not place.exists()
    if told[-1].layer:  # before the first layer is finished there is nothing to lose
        with pytest.raises(WriteError, match=r"was interrupted after . layers"):
            mc.calibrate(source, tokens, OPTIONS, output=place)
    after = []
    mc.calibrate(source, tokens, OPTIONS, output=place, resume=True, progress=after.append)
    assert contents(place) == contents(whole.folder)
    finished = told[-1].layer
    assert [p.layer for p in after] == [i for i in (0, 1, 2) if i >= finished for _ in range(3)]
    assert after[-1].done == after[-1].total == 3 * 68
    assert not place.with_name("stats.partial").exists()


KILLED = """
import os, signal, sys
import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
ids = eval(sys.argv[3])
def stop(p):
    if p.layer == 2:
        os.kill(os.getpid(), signal.SIGKILL)
mc.calibrate(mc.Checkpoint.open(sys.argv[1]), TokenSet.of_ids(ids),
             mc.CalibrateOptions(batch=3, similarity=True, sample=20), output=sys.argv[2],
             progress=stop)
"""


def test_a_killed_run_continues_to_the_same_bytes(
    source: mc.Checkpoint, tokens: TokenSet, whole: mc.ExpertStats, tmp_path: Path
) -> None:
    ids: dict[str, list[list[int]]] = {d: [] for d in tokens.domains}
    for s in tokens.sequences:
        ids[tokens.domains[s.domain]].append(list(s.ids))
    place = tmp_path / "stats"
    words = [sys.executable, "-c", KILLED, str(source.path), str(place), repr(ids)]
    assert subprocess.run(words, capture_output=True).returncode == -9
    kept = {p.name for p in place.with_name("stats.partial").glob("layer-*")}
    assert kept == {"layer-00000.safetensors", "layer-00001.safetensors"}
    mc.calibrate(source, tokens, OPTIONS, output=place, resume=True)
    assert contents(place) == contents(whole.folder)


def test_another_run_is_not_continued(
    source: mc.Checkpoint, tokens: TokenSet, tmp_path: Path
) -> None:
    def stop(p: Any) -> None:
        raise StopError

    place = tmp_path / "stats"
    with pytest.raises(StopError):
        mc.calibrate(source, tokens, OPTIONS, output=place, progress=stop)
    other = mc.CalibrateOptions(batch=2, dtype="float64", similarity=True, sample=20)
    with pytest.raises(WriteError) as caught:
        mc.calibrate(source, tokens, other, output=place, resume=True)
    assert "batch: then 3, now 2" in str(caught.value) and "dtype: then" in str(caught.value)
    mc.calibrate(source, tokens, other, output=place, overwrite=True)
    with pytest.raises(WriteError, match="is there already"):
        mc.calibrate(source, tokens, other, output=place)
    with pytest.raises(StopError):
        mc.calibrate(source, tokens, OPTIONS, output=place, overwrite=True, progress=stop)
    assert mc.ExpertStats.load(place).record.dtype == "float64", "the old result is still there"
    mc.calibrate(source, tokens, OPTIONS, output=place, overwrite=True, resume=True)
    assert mc.ExpertStats.load(place).record.dtype == "float32"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    with pytest.raises(WriteError, match="something else than statistics"):
        mc.calibrate(source, tokens, other, output=tmp_path / "mine", overwrite=True)


def test_on_disk_and_back(whole: mc.ExpertStats, tmp_path: Path) -> None:
    again = mc.ExpertStats.load(whole.save(tmp_path / "copy"))
    assert again.record == whole.record
    assert contents(tmp_path / "copy") == contents(whole.folder)
    for layer, stats in whole.layers.items():
        for name, table in stats.tensors.items():
            other = again.layers[layer].tensors[name]
            assert torch.equal(table, other)
            assert table.stride() == other.stride(), "and what is summed of it, in one order"
    with pytest.raises(WriteError, match="is there already"):
        whole.save(tmp_path / "copy")


def test_tables_lie_in_memory_as_on_the_disk(source: mc.Checkpoint, tokens: TokenSet) -> None:
    """A sum adds in the order of memory: measured as a transpose, it could end in other bits."""
    stats = mc.calibrate(source, tokens, mc.CalibrateOptions(batch=3))
    tables = [t for s in stats.layers.values() for t in s.tensors.values()]
    assert tables and all(t.is_contiguous() for t in tables)


@pytest.mark.parametrize("fault", ["none", "json", "format", "tables", "domains"])
def test_damaged_statistics(whole: mc.ExpertStats, tmp_path: Path, fault: str) -> None:
    folder = whole.save(tmp_path / "copy")
    record = json.loads((folder / files.RECORD).read_text())
    if fault == "none":
        (folder / files.RECORD).unlink()
    elif fault == "json":
        (folder / files.RECORD).write_text("{")
    elif fault == "format":
        (folder / files.RECORD).write_text(json.dumps(record | {"format": 99}))
    elif fault == "tables":
        (folder / files.TABLES).write_bytes((folder / files.TABLES).read_bytes()[:-8])
    else:
        (folder / files.RECORD).write_text(json.dumps(record | {"domains": ["a"]}))
    with pytest.raises((CheckpointError, OptionError)):
        mc.ExpertStats.load(folder)


def test_statistics_are_held_to_their_checkpoint(
    source: mc.Checkpoint, whole: mc.ExpertStats, tiny: Any
) -> None:
    assert whole.check(source, weights=True) is whole
    with pytest.raises(CheckpointError, match=r"measured on qwen3_moe \(.*not on qwen2_moe"):
        whole.check(tiny("qwen2_moe"))
    tuned = tiny("qwen3_moe", decoder_sparse_step=1, seed=5)
    whole.check(tuned)
    with pytest.raises(CheckpointError, match="but other weights"):
        whole.check(tuned, weights=True)


def test_parts_sum_to_the_whole(source: mc.Checkpoint, tokens: TokenSet) -> None:
    options = mc.CalibrateOptions(batch=1, dtype="float64")
    parts = [mc.calibrate(source, tokens.part(i, 3), options) for i in range(3)]
    everything = mc.calibrate(source, tokens, options)
    total = add_all(parts)
    assert total.record.tokens == everything.record.tokens
    for layer, stats in everything.layers.items():
        for name, table in stats.tensors.items():
            torch.testing.assert_close(total.layers[layer].tensors[name], table)
    with pytest.raises(OptionError, match="do not make 99 parts"):
        tokens.part(98, 99)
    with pytest.raises(OptionError, match="domains"):
        _ = parts[0] + mc.calibrate(source, TokenSet.of_ids({"a": [[3, 4]]}), options)


def test_similarities(source: mc.Checkpoint, whole: mc.ExpertStats) -> None:
    from transformers import AutoModelForCausalLM

    found = whole.similarity(1)
    model = AutoModelForCausalLM.from_pretrained(source.path, experts_implementation="eager")
    module = model.model.layers[1].mlp.experts
    x = found.inputs_SD
    assert x.shape == (20, 32) and len({tuple(row.tolist()) for row in x}) == 20
    with torch.no_grad():
        f = torch.stack([module(x, torch.full((20, 1), e), torch.ones(20, 1)) for e in range(6)])
        gate, up = torch.nn.functional.linear(x, module.gate_up_proj[2]).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        logits = x @ model.model.layers[1].mlp.gate.weight.T
    torch.testing.assert_close(found.mean_ED, f.mean(1), rtol=1e-5, atol=1e-6)
    unit = f / f.norm(dim=-1, keepdim=True)
    cosine = torch.einsum("itd,jtd->ij", unit, unit) / 20
    torch.testing.assert_close(found.cosine_EE, cosine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.hidden(2), hidden, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.logits_SE, logits, rtol=1e-4, atol=1e-5)
    columns = logits.T / logits.T.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.gate_EE, columns @ columns.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match="no expert 6"):
        found.hidden(6)
    size = sum((whole.folder / f"similarity-{i:05d}.safetensors").stat().st_size for i in range(3))
    assert whole.record.sample_bytes == size


def test_without_similarities(source: mc.Checkpoint, tokens: TokenSet) -> None:
    with pytest.raises(OptionError, match="similarities take a folder"):
        mc.calibrate(source, tokens, OPTIONS)
    stats = mc.calibrate(source, tokens, mc.CalibrateOptions())
    with pytest.raises(OptionError, match="hold no similarities"):
        stats.similarity(1)
    with pytest.raises(OptionError, match="layer 7 has no experts; those that have: 0, 1, 2"):
        stats.sums(7)
    with pytest.raises(OptionError, match="no domain 'x'; there are a, b"):
        stats.sums(1, "x")


def test_a_plan_is_measured_before_it_is_written(
    tiny: Any, tokens: TokenSet, tmp_path: Path
) -> None:
    plan = mc.upcycle(tiny("llama"), mc.UpcycleOptions(num_experts=4, top_k=2))
    stats = mc.calibrate(plan, tokens, mc.CalibrateOptions(batch=3))
    assert stats.check(plan, weights=True) and stats.experts(0) == 4
    written = mc.calibrate(mc.write(plan, tmp_path / "moe"), tokens, mc.CalibrateOptions(batch=3))
    for layer, sums in stats.layers.items():
        assert torch.equal(sums.sums_HCME, written.layers[layer].sums_HCME)


@pytest.mark.parametrize(
    ("family", "message"),
    [("llama", "has no experts"), ("jetmoe", "cannot be watched")],
)
def test_refused_families(tiny: Any, tokens: TokenSet, family: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        mc.calibrate(tiny(family), tokens)


def test_all_bad_options_at_once(source: mc.Checkpoint, tokens: TokenSet) -> None:
    bad = mc.CalibrateOptions(tokens=1, batch=0, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(OptionError) as caught:
        mc.calibrate(source, tokens, bad)
    assert len(caught.value.problems) == 3
    with pytest.raises(OptionError, match="token id 999 is beyond"):
        mc.calibrate(source, TokenSet.of_ids({"a": [[3, 999]]}))
    with pytest.raises(UnsupportedError, match="has no tokenizer"):
        mc.calibrate(source, ["some text"])


def test_worth_and_convergence(whole: mc.ExpertStats) -> None:
    sums = whole.sums(1)
    assert torch.equal(worth(whole, 1), sums["gated_norm"] / sums["count"].clamp(min=1))
    assert all(worth(whole, 1, c).shape == (6,) for c in CRITERIA if c != "loo-mse")
    mixed = worth(whole, 1, "easy-ep")
    assert float(mixed.sum()) == pytest.approx(2), "each domain weighs the same"
    assert float(worth(whole, 1, "easy-ep", domain="a").sum()) != pytest.approx(1)
    found = whole.convergence(0.5)
    assert found.keys() == {0, 1, 2} and all(0 <= c.jaccard <= 1 for c in found.values())
    with pytest.raises(OptionError, match="criterion"):
        worth(whole, 1, "magic")


def test_kendall_tau() -> None:
    a = torch.tensor([1.0, 2, 3, 4])
    assert kendall_tau(a, a) == 1 and kendall_tau(a, -a) == -1
    assert kendall_tau(a, torch.tensor([1.0, 3, 2, 4])) == pytest.approx(4 / 6)
    assert kendall_tau(a, torch.tensor([1.0, 1, 2, 2])) == pytest.approx(4 / (6 * 4) ** 0.5)
    assert kendall_tau(a, torch.zeros(4)) == 0


def test_overwriting_takes_statistics_only(
    source: mc.Checkpoint, tokens: TokenSet, tmp_path: Path
) -> None:
    place = tmp_path / "stats"
    mc.calibrate(source, tokens, OPTIONS, output=place)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match="something else than statistics"):
        mc.calibrate(source, tokens, OPTIONS, output=place, overwrite=True)
    assert (place / "notes.txt").read_text() == "mine"
    assert mc.ExpertStats.load(place).layers


def test_nan_is_no_statistic(source: mc.Checkpoint, tokens: TokenSet, tmp_path: Path) -> None:
    def change(tensors: Any) -> None:
        name = next(n for n in tensors if "layers.1" in n and "experts" in n)
        tensors[name].view(-1)[0] = float("nan")

    broken = mutant(source, tmp_path / "nan", tensors=change)
    with pytest.raises(CheckpointError, match="layer 1 computes NaN"):
        mc.calibrate(broken, tokens, mc.CalibrateOptions(batch=3))
