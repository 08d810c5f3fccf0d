"""`moe-compose upcycle`: the three modes side by side, and every exit code.

Run: pytest tests/cli/test_upcycle.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_compose import validation
from moe_compose.reporting import publish
from moe_compose.validation.report import Check, ValidationReport

BAD = ValidationReport(checkpoint="out", checks=(Check("tensors", "fail", "one [red]missing"),))


def test_for_people(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("upcycle", dense, tmp_path / "out", "--num-experts", "4")
    assert ran.code == 0, ran.err
    for text in ("[bold]tiny: llama, dense", "mixtral", "exact", "→", "F32", "digest"):
        assert text in ran.out
    assert "step-0 receipt" in ran.out
    assert "✓ valid" in ran.out
    assert "not trained after surgery" in ran.out
    assert "validating out against [bold]tiny" in ran.err
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "moe_compose.json", "validation.json", "model.safetensors"}
    assert "[bold]tiny" in (tmp_path / "out" / "README.md").read_text()


def test_for_programs(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("upcycle", dense, tmp_path / "out", "--num-experts", "4", "--json")
    document = json.loads(ran.out)
    assert ran.code == 0
    assert document["output"] == str(tmp_path / "out")
    assert len(document["plan_digest"]) == 64
    assert document["preservation"]["kind"] == "exact"
    assert document["parameters"]["total"] > document["parameters"]["active"] > 0
    assert document["validation"]["ok"] is True
    assert document["validation"]["receipt"]["met"] is True
    assert document["options"]["num_experts"] == 4
    files = (tmp_path / "out").glob("*.safetensors")
    assert document["weight_files"] == {p.name: p.stat().st_size for p in files}
    assert 0 < document["bytes"] < sum(document["weight_files"].values())
    assert document["seconds"] > 0
    assert "writing out" in ran.err


def test_for_scripts(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("upcycle", dense, tmp_path / "out", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, f"{tmp_path / 'out'}\n", "")


def test_a_dry_run_writes_nothing_and_says_the_same(
    command: Any, dense: Path, tmp_path: Path
) -> None:
    dry = command("upcycle", dense, tmp_path / "out", "--dry-run", "--json")
    assert dry.code == 0
    assert "are free" in dry.err
    assert not (tmp_path / "out").exists()
    wet = command("upcycle", dense, tmp_path / "out", "--no-validate", "--json")
    first, second = json.loads(dry.out), json.loads(wet.out)
    assert first.pop("dry_run") != second.pop("dry_run")
    assert first.pop("seconds") != second.pop("seconds")
    assert first == second
    assert first["validation"] is None
    refused = command("upcycle", dense, tmp_path / "out", "--dry-run")
    assert refused.code == 1
    assert "not empty" in refused.err


def test_not_validated_is_said(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("upcycle", dense, tmp_path / "out", "--no-validate")
    assert ran.code == 0
    assert "Not validated" in ran.err
    assert not (tmp_path / "out" / "validation.json").exists()
    assert "it was not validated" in (tmp_path / "out" / "README.md").read_text()


def test_wrong_options_exit_2_with_all_faults(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("upcycle", dense, tmp_path / "out", "--top-k", "9", "--granularity", "0")
    assert ran.code == 2
    assert "top_k (9)" in ran.err
    assert "granularity (0)" in ran.err
    assert ran.out == ""
    assert not (tmp_path / "out").exists()


def test_an_error_is_a_document_too(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("upcycle", dense, tmp_path / "out", "--top-k", "9", "--json")
    assert ran.code == 2
    error = json.loads(ran.out)["error"]
    assert (error["type"], error["exit_code"]) == ("OptionError", 2)
    assert len(error["problems"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methd", "copy"), "--methd"),
        (("--method", "cop"), "'copy'"),
        (("--shard-size", "5XB"), "5GB"),
        (("--num-experts", "many"), "--num-experts"),
    ],
)
def test_wrong_usage_exits_2(
    command: Any, dense: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    ran = command("upcycle", dense, tmp_path / "out", *words)
    assert ran.code == 2
    assert said in ran.err
    assert "--help shows how" in ran.err


def test_a_missing_source_exits_1(command: Any, tmp_path: Path) -> None:
    ran = command("upcycle", tmp_path / "nowhere", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.startswith("Error: there is no folder")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_text_that_cannot_be_read_is_found_before_anything_is_written(
    command: Any, dense: Path, tmp_path: Path, content: bytes | None, dry: tuple[str, ...]
) -> None:
    text, out = tmp_path / "typo.txt", tmp_path / "out"
    if content is not None:
        text.write_bytes(content)
    ran = command("upcycle", dense, out, "--data", text, *dry)
    assert ran.code == 2
    assert "typo.txt" in ran.err
    assert not out.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe with a name")
def test_a_pipe_is_not_read_before_it_is_needed(command: Any, dense: Path, tmp_path: Path) -> None:
    """As of `--data <(zcat text.gz)`: what was read once is gone."""
    os.mkfifo(tmp_path / "pipe")
    ran = command("upcycle", dense, tmp_path / "out", "--data", tmp_path / "pipe", "--dry-run")
    assert ran.code == 0


def test_what_is_written_but_not_valid_exits_3(
    command: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "validate", lambda *_, **__: BAD)
    ran = command("upcycle", dense, tmp_path / "out")
    assert ran.code == 3
    assert "one [red]missing" in ran.out
    assert "✗ not valid" in ran.out
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["ok"] is False
    again = command("upcycle", dense, tmp_path / "out", "--overwrite", "--json")
    assert again.code == 3
    assert json.loads(again.out)["validation"]["ok"] is False


def test_an_unexpected_fault_exits_1_without_a_traceback(
    command: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(publish, "write", fail)
    ran = command("upcycle", dense, tmp_path / "out")
    assert ran.code == 1
    assert "KeyError: 'surprise'" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in command("--debug", "upcycle", dense, tmp_path / "out").err


def test_ctrl_c_while_writing_says_how_to_go_on(
    command: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "write", stop)
    ran = command("upcycle", dense, tmp_path / "out")
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "--resume" in ran.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe with a name")
def test_a_real_signal_while_validating(dense: Path, tmp_path: Path) -> None:
    """Validation waits for a pipe that nobody fills."""
    pipe = tmp_path / "text"
    os.mkfifo(pipe)
    words = ["upcycle", str(dense), str(tmp_path / "out")]
    code = (
        "from moe_compose import validation; from moe_compose_cli.main import main;"
        f"validation.validate = lambda *_, **__: open({str(pipe)!r}).read(); main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True
    )
    try:
        writer = _open_when_read(pipe, child)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
        os.close(writer)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert "written, but not validated" in err
    assert "Traceback" not in err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def _open_when_read(pipe: Path, child: subprocess.Popen[str]) -> int:
    """Wait until the child reads the pipe."""
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"the child never read its text (exit code {child.poll()})")


def test_resume_goes_on(command: Any, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("upcycle", dense, out, "--no-validate", "--shard-size", "20KB")
    assert command(*words).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    last = max(p for p in out.glob("*.safetensors"))
    last.unlink()
    (out / "model.safetensors.index.json").unlink()
    assert command(*words).code == 1
    assert command(*words, "--resume").code == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
