"""`moe-compose prune`: the three modes, statistics, rankings, and what is refused.

Run: pytest tests/cli/test_prune.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs
from pruned import lively_checkpoint
from typer.main import get_command

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "[bold]moe"
    lively_checkpoint("mixtral", folder)
    return folder


@pytest.fixture(scope="module")
def stats(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    rows = [[draw.randrange(3, 96) for _ in range(24)] for _ in range(8)]
    tokens = TokenSet.of_ids({"a": rows[:4], "b": rows[4:]})
    found = mc.calibrate(mc.Checkpoint.open(moe), tokens)
    return found.save(tmp_path_factory.mktemp("stats") / "stats")


def test_every_field_is_a_flag() -> None:
    group: Any = get_command(app)
    flags = {p.name: p for p in group.commands["prune"].params}
    docs = attribute_docs(mc.PruneOptions)
    for name, text in docs.items():
        assert flags[name].opts == [f"--{name.replace('_', '-')}"]
        assert flags[name].help == text


def test_for_people(command: Any, moe: Path, stats: Path, tmp_path: Path) -> None:
    ran = command("prune", moe, tmp_path / "out", "--stats", stats, "--keep", "4", "--explain")
    assert ran.code == 0, ran.err
    for text in ("[bold]moe: mixtral", "reap", "2510.13999", "why it goes", "5 of 6; 4 are kept"):
        assert text in ran.out
    assert "exactly the source with the removed experts masked" in " ".join(ran.out.split())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "moe_compose.json", "pruning.json", "validation.json"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--stats stats" in card
    assert "REAP" in card
    again = command("validate", tmp_path / "out", "--against", moe)
    assert "exactly the source with the removed experts masked" in " ".join(again.out.split())


def test_for_programs_and_scripts(command: Any, moe: Path, stats: Path, tmp_path: Path) -> None:
    words = ("prune", moe, tmp_path / "out", "--stats", stats, "--ratio", "0.5")
    dry = command(*words, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "out").exists()
    wet = json.loads(command(*words, "--no-validate", "--json").out)
    first = json.loads(dry.out)
    assert first["plan_digest"] == wet["plan_digest"]
    assert first["decided"]["kept"] == wet["decided"]["kept"]
    assert {len(ids) for ids in wet["decided"]["kept"].values()} == {3}
    quiet = command("prune", moe, tmp_path / "q", "--keep", "3", "--criterion", "random", "-q")
    assert (quiet.code, quiet.out) == (0, f"{tmp_path / 'q'}\n")


def test_a_ranking_from_a_file(command: Any, moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    file.write_text(json.dumps({str(i): [5, 4, 3, 2, 1, 0] for i in range(3)}))
    words = ("--keep", "2", "--criterion", "given", "--ranking", file, "--no-validate", "--json")
    ran = command("prune", moe, tmp_path / "out", *words)
    assert json.loads(ran.out)["decided"]["kept"] == {str(i): [4, 5] for i in range(3)}


def test_without_any_text(command: Any, moe: Path, tmp_path: Path) -> None:
    words = ("--keep", "3", "--criterion", "aimer", "--no-validate")
    ran = command("prune", moe, tmp_path / "out", *words)
    assert ran.code == 0, ran.err
    assert "2603.18492" in ran.out


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--keep", "1"), 2, "top_k = 2"),
        (("--keep", "3"), 2, "needs statistics"),
        (("--keep", "3", "--ratio", "0.5"), 2, "keep and ratio given"),
        (("--keep", "3", "--criterion", "worst"), 2, "'worst' is not one of"),
        (("--keep", "3", "--criterion", "random", "--stats", "nowhere"), 2, "no meaning"),
        (("--keep", "3", "--stats", "nowhere"), 1, "holds no statistics"),
    ],
)
def test_refusals(words: tuple, code: int, why: str, command: Any, moe: Path, tmp_path: Path):
    ran = command("prune", moe, tmp_path / "out", *words)
    assert ran.code == code
    assert why in ran.err
    assert not (tmp_path / "out").exists()


def test_statistics_of_other_weights(command: Any, stats: Path, moe: Path, tmp_path: Path) -> None:
    lively_checkpoint("mixtral", tmp_path / "other", seed=5)
    words = ("--stats", stats, "--keep", "3")
    ran = command("prune", tmp_path / "other", tmp_path / "out", *words)
    assert ran.code == 1
    assert "other weights" in ran.err


def test_dense_models_have_nothing_to_prune(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("prune", dense, tmp_path / "out", "--keep", "3", "--criterion", "random")
    assert ran.code == 2
    assert "has no experts" in ran.err
