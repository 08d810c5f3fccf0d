"""`moe-compose merge`: the three modes, and what is refused.

Run: pytest tests/cli/test_merge.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from merged import measured, tokens
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs
from pruned import lively_checkpoint
from tiny_models import tiny_checkpoint
from typer.main import get_command

import moe_compose as mc

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "[bold]moe"
    lively_checkpoint("mixtral", folder)
    return folder


@pytest.fixture(scope="module")
def stats(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "stats"
    measured(mc.Checkpoint.open(moe), folder)
    return folder


def test_every_field_is_a_flag() -> None:
    group: Any = get_command(app)
    flags = {p.name: p for p in group.commands["merge"].params}
    for name, text in attribute_docs(mc.MergeOptions).items():
        assert flags[name].opts == [f"--{name.replace('_', '-')}"]
        assert flags[name].help == text


def test_for_people(command: Any, moe: Path, stats: Path, tmp_path: Path) -> None:
    ran = command("merge", moe, tmp_path / "out", "--stats", stats, "--keep", "4", "--explain")
    assert ran.code == 0, ran.err
    for text in ("[bold]moe: mixtral", "ream", "2604.04356", "mean of", "neurons moved"):
        assert text in ran.out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "moe_compose.json", "merging.json", "validation.json"}
    assert "--stats stats" in (tmp_path / "out" / "README.md").read_text()


def test_for_programs(command: Any, moe: Path, stats: Path, tmp_path: Path) -> None:
    words = ("merge", moe, tmp_path / "out", "--stats", stats, "--keep", "3", "--method", "hc-smoe")
    dry = command(*words, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "out").exists()
    wet = json.loads(command(*words, "--no-validate", "--json").out)
    first = json.loads(dry.out)
    assert first["plan_digest"] == wet["plan_digest"]
    assert {len(groups) for groups in wet["decided"]["groups"].values()} == {3}


def test_in_sequence(command: Any, tmp_path: Path) -> None:
    """From text, without statistics."""
    moe, text = tmp_path / "moe", tmp_path / "en.txt"
    tiny_checkpoint("qwen3_moe", moe, vocab_size=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, moe / name)
    text.write_text("Once upon a time there was a little dog. " * 40)
    words = ("merge", moe, tmp_path / "out", "--keep", "4", "--domain", f"en={text}")
    small = ("--tokens", "300", "--seq-len", "32", "--sample", "16")
    ran = command(*words, *small, "--no-validate", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["decided"]["of"]["in_sequence"]
    assert found["options"]["domain"] == ["en=en.txt"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--domain en=en.txt" in card
    assert "--tokens 300" in card


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "neither given"),
        (("--stats", "x", "--domain", "a=b"), "both given"),
        (("--stats", "x", "--tokens", "9"), "are of the text of --domain"),
    ],
)
def test_statistics_or_text(words: tuple, why: str, command: Any, moe: Path, tmp_path: Path):
    ran = command("merge", moe, tmp_path / "out", "--keep", "3", *words)
    assert ran.code == 2
    assert why in ran.err


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--keep", "1"), 2, "top_k = 2"),
        ((), 2, "neither given"),
        (("--keep", "3", "--method", "best"), 2, "'best' is not one of"),
        (("--keep", "3", "--router", "mean"), 2, "router = mean is hc-smoe's"),
    ],
)
def test_refusals(
    words: tuple, code: int, why: str, command: Any, moe: Path, stats: Path, tmp_path: Path
) -> None:
    ran = command("merge", moe, tmp_path / "out", "--stats", stats, *words)
    assert ran.code == code
    assert why in ran.err
    assert not (tmp_path / "out").exists()


def test_statistics_without_similarities(command: Any, moe: Path, tmp_path: Path) -> None:
    mc.calibrate(mc.Checkpoint.open(moe), tokens()).save(tmp_path / "plain")
    words = ("--stats", tmp_path / "plain", "--keep", "3")
    ran = command("merge", moe, tmp_path / "out", *words)
    assert ran.code == 2
    assert "--similarity" in ran.err


def test_refitting_merged_experts(command: Any, tmp_path: Path) -> None:
    """The one model here with a tokenizer, and experts made of it."""
    plan = mc.upcycle(
        mc.Checkpoint.open(STORIES), mc.UpcycleOptions(num_experts=4, top_k=2, method="drop")
    )
    moe = mc.write(plan, tmp_path / "moe").path
    text = tmp_path / "story.txt"
    text.write_text("<|endoftext|>".join(["Once upon a time there was a dog. " * 20] * 12))
    words = ("merge", moe, tmp_path / "out", "--keep", "3", "--method", "hc-smoe", "--explain")
    words += ("--domain", f"a={text}", "--tokens", "600", "--sample", "64", "--no-validate")
    ran = command(*words, "--refit", "--refit-on", text, "--refit-tokens", "1200")
    assert ran.code == 0, ran.err
    assert "error of the routed output" in ran.out and "mean of" in ran.out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"merging.json", "refit.json"}
    assert "--refit needs text" in command(*words, "--refit").err
    assert "no meaning without --refit" in command(*words, "--refit-on", text).err
