"""`moe-compose extract`: the three modes, and what is refused.

Run: pytest tests/cli/test_extract.py
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs
from typer.main import get_command

import moe_compose as mc
from moe_compose.surgery.extract_options import ExtractOptions


@pytest.fixture
def moe(dense: Path, tmp_path: Path) -> Path:
    """A tiny Llama grown into a Mixtral of four."""
    plan = mc.upcycle(mc.Checkpoint.open(dense), mc.UpcycleOptions(num_experts=4, top_k=2))
    mc.write(plan, tmp_path / "[bold]moe")
    return tmp_path / "[bold]moe"


def test_every_field_is_a_flag() -> None:
    group: Any = get_command(app)
    flags = {p.name: p for p in group.commands["extract"].params}
    docs = attribute_docs(ExtractOptions)
    for field in fields(ExtractOptions):
        assert flags[field.name].help == docs[field.name]
        assert flags[field.name].default == field.default


def test_for_people(command: Any, moe: Path, tmp_path: Path) -> None:
    ran = command("extract", moe, tmp_path / "out", "--expert", "3")
    assert ran.code == 0, ran.err
    for text in ("[bold]moe: mixtral", "llama, dense", "expert 3 of 4 answers", "✓ valid"):
        assert text in ran.out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "moe_compose.json", "validation.json", "model.safetensors"}


def test_for_programs_the_dense_model_is_back(
    command: Any, dense: Path, moe: Path, tmp_path: Path
) -> None:
    ran = command("extract", moe, tmp_path / "out", "--json")
    document = json.loads(ran.out)
    assert ran.code == 0, ran.err
    assert document["operation"] == "extract"
    assert document["decided"] == {"expert": 0, "target": "llama"}
    assert document["validation"]["receipt"]["met"] is True
    back, source = mc.Checkpoint.open(tmp_path / "out"), mc.Checkpoint.open(dense)
    assert back.tensors.keys() == source.tensors.keys()
    assert all((back.read(n) == source.read(n)).all() for n in source.tensors)


def test_a_dry_run_writes_nothing(command: Any, moe: Path, tmp_path: Path) -> None:
    ran = command("extract", moe, tmp_path / "out", "--dry-run")
    assert ran.code == 0, ran.err
    assert "nothing was written" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--expert", "4"), "there is no expert '4'"),
        (("--expert", "math"), "there is no expert 'math'"),
        (("--target", "qwen3"), "no dense qwen3 computes what mixtral does"),
    ],
)
def test_what_cannot_be_meant_exits_2(
    command: Any, moe: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    ran = command("extract", moe, tmp_path / "out", *words)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def test_a_dense_source_exits_2(command: Any, dense: Path, tmp_path: Path) -> None:
    ran = command("extract", dense, tmp_path / "out")
    assert ran.code == 2
    assert "has no experts" in ran.err
