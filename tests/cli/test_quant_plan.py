"""`moe-compose quant-plan`: the three modes, the files, and what is refused.

Run: pytest tests/cli/test_quant_plan.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs
from pruned import lively_checkpoint
from typer.main import get_command

import moe_compose as mc
from moe_compose.calibration.quant_options import QuantPlanOptions
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
    found = mc.calibrate(mc.Checkpoint.open(moe), TokenSet.of_ids({"a": rows}))
    return found.save(tmp_path_factory.mktemp("stats") / "stats")


def test_every_field_is_a_flag() -> None:
    group: Any = get_command(app)
    flags = {p.name: p for p in group.commands["quant-plan"].params}
    for name, text in attribute_docs(QuantPlanOptions).items():
        assert flags[name].opts == [f"--{name.replace('_', '-')}"]
        assert flags[name].help == text


def test_for_people(
    command: Any, moe: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = command("quant-plan", moe, stats, "--budget", "6", "--out", tmp_path / "q")
    words = " ".join(ran.out.split())
    assert ran.code == 0 and "[bold]moe" in words and "9 at 4 bits, 9 at 8" in words
    assert "6.00 bits a weight" in words and "llm-compressor" in ran.err
    recipe = yaml.safe_load((tmp_path / "q" / "recipe.yaml").read_text())
    assert "GPTQModifier" in recipe["quant_stage"]["quant_modifiers"]
    assert (tmp_path / "q" / "quant-plan.json").is_file()
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = command("quant-plan", moe, stats).out
        assert max(map(len, shown.splitlines())) <= columns


def test_for_programs_and_scripts(command: Any, moe: Path, stats: Path, tmp_path: Path) -> None:
    document = json.loads(command("quant-plan", moe, stats, "--share", "0.5", "--json").out)
    assert document["mean_bits"] == 6 and len(document["layers"]) == 3
    assert document["options"]["share"] == 0.5
    quiet = command("quant-plan", moe, stats, "--share", "0.5", "-q")
    assert (quiet.out, quiet.err) == ("6.000\n", "")
    out = tmp_path / "q"
    assert command("quant-plan", moe, stats, "-q", "--out", out).out == f"{out}/recipe.yaml\n"


def test_what_is_refused(command: Any, moe: Path, stats: Path, tmp_path: Path) -> None:
    ran = command("quant-plan", moe, stats, "--share", "0.5", "--budget", "6")
    assert ran.code == 2 and "give one of them" in ran.err
    out = tmp_path / "q"
    assert command("quant-plan", moe, stats, "--out", out).code == 0
    again = command("quant-plan", moe, stats, "--out", out)
    assert again.code == 1 and "--overwrite" in again.err
    assert command("quant-plan", moe, stats, "--out", out, "--overwrite").code == 0
