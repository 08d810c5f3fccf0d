"""`prune --refit`, `prune --max-kl` and `sweep`, as people type them.

pytest tests/cli/test_recovery.py
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint

import moe_compose as mc

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"


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
    dogs = [f"Dog number {n} ran {n * 7 % 13} miles and slept.\n" for n in range(60)]
    cats = [f"The cat of house {n * 3} likes milk, not {n} mice.\n" for n in range(60)]
    (folder / "fit.txt").write_text("<|endoftext|>".join(dogs))
    (folder / "held.txt").write_text("<|endoftext|>".join(cats))
    return folder


@pytest.fixture(scope="module")
def stats(moe: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = mc.calibrate(mc.Checkpoint.open(moe), [(texts / "fit.txt").read_text()])
    return found.save(tmp_path_factory.mktemp("stats") / "stats")


def test_prune_and_refit(command: Any, moe: Path, texts: Path, stats: Path, tmp_path: Path) -> None:
    words = ("prune", moe, tmp_path / "out", "--stats", stats, "--keep", "4", "--refit")
    ran = command(*words, "--refit-tokens", "1500", "--data", texts / "fit.txt", "--explain")
    assert ran.code == 0, ran.err
    for said in ("refit", "before", "after", "why it goes", "down-projections refitted"):
        assert said in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80 or "python -c" in ran.out
    report = json.loads((tmp_path / "out" / "refit.json").read_text())
    assert report["tokens"]["fitted"] > report["tokens"]["held_out"] > 0
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    entry = pruning["lost"]["layers"]["0"]
    assert 0 < entry["displaced"] < 1 and entry["random"] == pytest.approx(2 / 6)
    history = json.loads((tmp_path / "out" / "moe_compose.json").read_text())
    assert [r["operation"] for r in history] == ["prune", "refit"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--refit-on fit.txt" in card and "moe-compose prune" in card
    dry = command(
        words[0],
        moe,
        tmp_path / "dry",
        *words[3:],
        "--data",
        texts / "fit.txt",
        "--dry-run",
        "--json",
    )
    assert dry.code == 0 and "nothing is refitted" in dry.err
    assert json.loads(dry.out)["operation"] == "prune"


def test_prune_to_a_kl(command: Any, moe: Path, texts: Path, stats: Path, tmp_path: Path) -> None:
    words = ("prune", moe, tmp_path / "out", "--stats", stats, "--max-kl", "50")
    ran = command(*words, "--data", texts / "held.txt", "--no-validate")
    assert ran.code == 0, ran.err
    assert "by bisection" in ran.out
    found = json.loads((tmp_path / "out" / "max_kl.json").read_text())
    assert (
        found["chosen"]["keep"] == 2 == mc.Checkpoint.open(tmp_path / "out").config["num_experts"]
    )
    ran = command(
        *("prune", moe, tmp_path / "tight", "--stats", stats, "--max-kl", "1e-9"),
        *("--data", texts / "held.txt"),
    )
    assert ran.code == 4 and "stays within KL 1e-09" in ran.err


def test_sweep(command: Any, moe: Path, texts: Path, stats: Path, tmp_path: Path) -> None:
    words = ("sweep", moe, "--stats", stats, "--data", texts / "held.txt", "--tokens", "400")
    more = ("--ratios", "0.2,0.5", "--criteria", "reap", "--max-kl", "50")
    drawn = ("--plot", tmp_path / "s.svg") if find_spec("matplotlib") else ()
    ran = command(*words, *more, "--out", tmp_path / "s.json", *drawn)
    assert ran.code == 0, ran.err
    for said in ("[red]moe", "original", "random", "smallest within KL 50: "):
        assert said in ran.out
    assert not drawn or (tmp_path / "s.svg").read_text().lstrip().startswith("<?xml")
    document = json.loads(command(*words, *more, "--json").out)
    assert document == json.loads((tmp_path / "s.json").read_text())
    assert len(document["candidates"]) == 4
    quiet = command(*words, *more, "-q").out.split()
    assert quiet[0] in ("reap", "random") and quiet[1] == "3"
    again = command(*words, *more, "--out", tmp_path / "s.json")
    assert again.code == 1 and "--overwrite" in again.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keep", "4", "--refit"), "--refit needs text"),
        (("--keep", "4", "--refit-on", "a.txt"), "without --refit"),
        (("--max-kl", "0.1"), "--max-kl needs held-out text"),
        (("--max-kl", "0.1", "--refit", "--data", "a.txt"), "text of its own"),
        (("--keep", "4", "--data", "a.txt", "--data", "b.txt"), "one --data FILE"),
        (("--keep", "4", "--refit", "--data", "a.txt", "--refit-on", "b.txt"), "needs text"),
    ],
)
def test_texts_that_cannot_be_meant(command: Any, moe: Path, words: tuple, said: str) -> None:
    ran = command("prune", moe, "nowhere", "--criterion", "random", *words)
    assert ran.code == 2 and said in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--data"),
        (("--data", "x.txt", "--ratios", "half"), "0.125,0.25"),
        (("--data", "x.txt", "--criteria", "best"), "criterion (best)"),
        (("--data", "x.txt", "--plot", "a.gif"), "must end in"),
        (("--data", "x.txt", "--refit-on", "y.txt"), "without --refit"),
    ],
)
def test_sweeps_that_cannot_be_meant(command: Any, moe: Path, words: tuple, said: str) -> None:
    ran = command("sweep", moe, *words)
    assert ran.code == 2 and said in ran.err, ran.err


def test_text_that_is_fitted_to_is_not_judged_on(command: Any, moe: Path, texts: Path) -> None:
    same = ("--data", texts / "fit.txt", "--refit", "--refit-on", texts / "fit.txt")
    ran = command("sweep", moe, "--criteria", "random", *same)
    assert ran.code == 2 and "would flatter" in ran.err.replace("\n", " ")
