"""`calibrate`, `inspect --stats` and `plot`, as they are typed.

Run: pytest tests/cli/test_calibrate.py
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs
from tiny_models import tiny_checkpoint
from typer.main import get_command

from moe_compose.calibration.options import CalibrateOptions

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "examples/models/stories260K"
SMALL = ("--tokens", "300", "--seq-len", "32", "--batch", "4")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE with a real tokenizer."""
    folder = tmp_path_factory.mktemp("moe") / "[red]moe"
    tiny_checkpoint("qwen3_moe", folder, vocab_size=512, decoder_sparse_step=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("Once upon a time there was a little dog. " * 40)
    (folder / "b.txt").write_text("x = [1, 2, 3]\nprint(sum(x))\n" * 40)
    (folder / "bad.jsonl").write_text('{"txt": "a"}\n')
    return folder


def test_flags_are_the_options() -> None:
    command: Any = get_command(app)
    flags = {p.name: p for p in command.commands["calibrate"].params}
    docs = attribute_docs(CalibrateOptions)
    assert docs.keys() == {f.name for f in fields(CalibrateOptions)}
    for field in fields(CalibrateOptions):
        assert flags[field.name].help == docs[field.name]
        assert flags[field.name].default == field.default


def test_from_text_to_picture(command: Any, moe: Path, texts: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    domains = ("--domain", f"en={texts / 'a.txt'}", "--domain", f"py={texts / 'b.txt'}")
    done = command("calibrate", moe, stats, *domains, *SMALL, "--similarity", "--sample", "16")
    assert done.code == 0, done.err
    assert "[red]moe" in done.out and "300: en 150, py 150" in done.out
    assert "900 of 900 tokens × layers (100%)" in done.err and "--stats" in done.err
    assert all(len(line.rstrip()) <= 80 for line in done.out.splitlines())
    seen = command("inspect", moe, "--stats", stats)
    assert seen.code == 0 and "layers down, experts across" in seen.out and "▄" in seen.out
    assert all(len(line.rstrip()) <= 80 for line in seen.out.splitlines())
    found = json.loads(command("inspect", moe, "--stats", stats, "--json").out)["stats"]
    assert [x["layer"] for x in found["layers"]] == [0, 1, 2]
    assert sum(found["layers"][0]["load"]) == 600
    again = command("calibrate", moe, stats, *domains, *SMALL)
    assert again.code == 1 and "is there already" in again.err and "--overwrite" in again.err
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    for name, begin in (("p.png", b"\x89PNG"), ("p.html", b"<!doctype html>")):
        drawn = command("plot", stats, tmp_path / name, "--quiet")
        assert drawn.code == 0, drawn.err
        assert drawn.out.strip() == str(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert command("plot", stats, tmp_path / "p.png").code == 1
    assert command("plot", stats, tmp_path / "p.gif").code == 2


def test_json_and_quiet(command: Any, moe: Path, texts: Path, tmp_path: Path) -> None:
    words = ("calibrate", moe, tmp_path / "a", "--data", texts / "a.txt", *SMALL, "--json")
    found = json.loads(command(*words).out)
    assert found["domains"] == ["text"] and found["tokens"][0][0] + found["tokens"][1][0] == 300
    assert found["files"][0][0]["name"] == "a.txt" and len(found["files"][0][0]["sha256"]) == 64
    quiet = command("calibrate", moe, tmp_path / "b", "--data", texts / "a.txt", *SMALL, "-q")
    assert quiet.out.strip() == str(tmp_path / "b") and not quiet.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no text"),
        (("--domain", "a"), "--domain a: it must be name=FILE"),
        (("--domain", "a=none.txt"), "cannot read none.txt"),
        (("--data", "{bad}"), "bad.jsonl:1: neither 'text' nor 'messages'"),
        (("--data", "{good}", "--batch", "0"), "batch (0) must be at least 1"),
        (("--data", "{good}", "--dtype", "int8"), "int8"),
    ],
)
def test_wrong_usage(
    command: Any, moe: Path, texts: Path, tmp_path: Path, words: Any, message: str
) -> None:
    names = {"bad": texts / "bad.jsonl", "good": texts / "a.txt"}
    done = command("calibrate", moe, tmp_path / "s", *(w.format(**names) for w in words))
    assert done.code == 2 and message in done.err
    assert not list(tmp_path.iterdir())


def test_dense_and_missing(command: Any, dense: Path, texts: Path, tmp_path: Path) -> None:
    done = command("calibrate", dense, tmp_path / "s", "--data", texts / "a.txt")
    assert done.code == 2 and "has no experts" in done.err
    done = command("inspect", dense, "--stats", tmp_path)
    assert done.code == 1 and "holds no statistics" in done.err


def test_without_matplotlib(
    command: Any, moe: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("calibrate", moe, tmp_path / "s", "--data", texts / "a.txt", *SMALL, "-q")
    assert command(*words).code == 0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = command("plot", tmp_path / "s", tmp_path / "p.png")
    assert done.code == 2 and "drawing needs matplotlib" in done.err
    assert "pip install 'moe-compose[plot]'" in done.err
