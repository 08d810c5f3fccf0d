"""SHA-256 of the sources, in the record and the card of a result.

Run: pytest tests/reporting/test_hashes.py
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dense import dense_llama
from hand_made import Make, plan_of
from mutants import mutant

import moe_compose as mc
from moe_compose.reporting import hashes
from moe_compose.reporting.hashes import Hashing
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.transforms import Read
from moe_compose.validation.report import Check, ValidationReport

PASSES = ValidationReport(checkpoint="out", checks=(Check("tensors", "pass", "all there"),))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources(folder: Path) -> list[dict[str, Any]]:
    """The sources in the last record."""
    found: list[dict[str, Any]] = json.loads((folder / "moe_compose.json").read_text())
    entries: list[dict[str, Any]] = found[-1]["sources"]
    return entries


def without_hashes(folder: Path, plan: mc.Plan) -> None:
    """As if the write had been killed between its last shard and the hashes."""
    history = json.loads((folder / "moe_compose.json").read_text())
    for record in history:
        for entry in record["sources"]:
            del entry["files"]
    (folder / "moe_compose.json").write_text(json.dumps(history, indent=2) + "\n")
    (folder / "README.md").write_text(mc.model_card(plan, None))


def test_record_and_card_name_what_was_read(make: Make, tmp_path: Path) -> None:
    source = make()
    mc.write(plan_of(source), tmp_path / "out")
    digest = sha256(source.path / "model.safetensors")
    [entry] = sources(tmp_path / "out")
    assert entry == {
        "label": "dense",
        "digest": source.digest(),
        "model_type": "llama",
        "files": {"model.safetensors": digest},
    }
    assert f"| `model.safetensors` | `{digest}` |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_is_the_one_that_is_made_at_once(make: Make, tmp_path: Path) -> None:
    source = make(files={"README.md": "# old\n\n## Sources\n\nnone"})
    plan = plan_of(source)
    mc.write(plan, tmp_path / "out")
    known = {"model.safetensors": sha256(source.path / "model.safetensors")}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card == mc.model_card(plan, None, source_hashes=known)


def test_resume_adds_what_a_kill_lost(make: Make, tmp_path: Path) -> None:
    plan, out = plan_of(make()), tmp_path / "out"
    mc.write(plan, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    without_hashes(out, plan)
    mc.write(plan, out, resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_resume_keeps_what_was_measured_and_added(make: Make, tmp_path: Path) -> None:
    source = make()
    plan, out = plan_of(source), tmp_path / "out"
    written = mc.write(plan, out)
    without_hashes(out, plan)
    mc.record_validation(written, plan, PASSES)
    card = out / "README.md"
    assert "SHA-256 |" not in card.read_text()
    card.write_text(card.read_text() + "\nadded by hand\n")
    mc.write(plan, out, resume=True)
    text = card.read_text()
    assert sha256(source.path / "model.safetensors") in text
    assert "1 pass" in text and text.endswith("added by hand\n")


def test_resuming_a_finished_write_changes_nothing(make: Make, tmp_path: Path) -> None:
    plan, out = plan_of(make()), tmp_path / "out"
    written = mc.write(plan, out)
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    mc.write(plan, out, resume=True)  # hashes the source, to know it again, and changes nothing
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    mc.record_validation(written, plan, PASSES)
    assert sources(out)[0]["files"]["model.safetensors"] in (out / "README.md").read_text()


def test_a_record_that_was_taken_away_stays_away(make: Make, tmp_path: Path) -> None:
    plan, out = plan_of(make()), tmp_path / "out"
    mc.write(plan, out)
    (out / "moe_compose.json").unlink()
    mc.write(plan, out, resume=True)
    assert not (out / "moe_compose.json").exists()


def test_through_plans_of_plans(make: Make, tmp_path: Path) -> None:
    """Each checkpoint's hashes stand in the record of the operation that read it."""
    source = make()
    inner = plan_of(source)
    outputs = tuple(OutputTensor(t.name, Read("moe", t)) for t in inner.tensors.values())
    outer = replace(inner, operation="prune", outputs=outputs, sources={"moe": inner}, card=None)
    mc.write(outer, tmp_path / "out")
    first, second = json.loads((tmp_path / "out" / "moe_compose.json").read_text())
    digest = sha256(source.path / "model.safetensors")
    assert first["sources"][0]["files"] == {"model.safetensors": digest}
    assert "files" not in second["sources"][0]
    assert digest in (tmp_path / "out" / "README.md").read_text()


def test_hashes_of_several_sources_are_told_apart(make: Make) -> None:
    one, two = make(), make(name="other")
    plan = replace(plan_of(one), sources={"dense": one, "other": two})
    found = {path: c.label for c in (one, two) for path in c.weight_files}
    assert hashes.by_name(plan, found) == {
        "dense/model.safetensors": "dense",
        "other/model.safetensors": "other",
    }


def test_they_come_from_the_cache_where_it_knows_them(make: Make) -> None:
    source = make()
    [file] = source.weight_files
    blob = source.path.parent / "blobs" / ("cd" * 32)
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    with Hashing([file]) as hashing:
        assert hashing.result() == {file: "cd" * 32}


def test_hashing_ends_with_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Ctrl-C stops the write: nothing goes on reading."""
    begun, go_on = threading.Event(), threading.Event()
    path = tmp_path / "large"
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(hashes, "STEP_BYTES", 1)

    class Slow:
        def update(self, data: object) -> None:
            begun.set()
            assert go_on.wait(timeout=30)

    monkeypatch.setattr(hashlib, "sha256", Slow)
    with Hashing([path, path]) as hashing:
        assert begun.wait(timeout=30)
        hashing._stop.set()
        go_on.set()
    assert not any(t.is_alive() for t in hashing._threads)
    assert hashing.result() == {}


def test_a_file_that_cannot_be_read_is_said_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"x")
    files = [tmp_path / "gone", there]
    with caplog.at_level(logging.WARNING, "moe_compose"), Hashing(files) as hashing:
        assert hashing.result() == {there: hashlib.sha256(b"x").hexdigest()}
    assert "no SHA-256 of gone is recorded (No such file or directory)" in caplog.text


def test_a_write_that_is_refused_leaves_no_thread(make: Make, tmp_path: Path) -> None:
    plan = plan_of(make())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    before = threading.active_count()
    with pytest.raises(mc.WriteError, match="not empty"):
        mc.write(plan, tmp_path / "out")
    assert threading.active_count() == before


def test_a_finished_result_of_other_weights_is_not_resumed(tmp_path: Path) -> None:
    """Two fine-tunes have one config and equal headers, so equal digests; their weights differ."""
    one = dense_llama(tmp_path / "one")
    two = mutant(one, tmp_path / "two", tensors=lambda t: t["model.norm.weight"].mul_(2))
    options = mc.UpcycleOptions(num_experts=4)
    first, second = mc.upcycle(one, options), mc.upcycle(two, options)
    assert first.digest() == second.digest()
    mc.write(first, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    with pytest.raises(mc.WriteError, match="made from other weights"):
        mc.write(second, tmp_path / "out", resume=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    mc.write(first, tmp_path / "out", resume=True)
