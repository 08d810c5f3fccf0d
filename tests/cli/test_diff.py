"""`moe-compose diff`: the three modes, widths, and exit codes.

Run: pytest tests/cli/test_diff.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pruned import lively_checkpoint, selected

import moe_compose as mc


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "[bold]moe"
    lively_checkpoint("mixtral", folder)
    return folder


@pytest.fixture(scope="module")
def after(before: Path) -> Path:
    plan = selected(mc.Checkpoint.open(before), dict.fromkeys(range(3), (5, 1)))
    folder = before.parent / "small"
    mc.write(plan, folder)
    return folder


def test_for_people(
    command: Any, before: Path, after: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = command("diff", before, after)
    assert ran.code == 0 and "comparing" in ran.err
    words = " ".join(ran.out.split())
    assert "[bold]moe → small" in words
    assert "3 moved, 3 same, 12 removed" in words or "12 removed, 3 moved, 3 same" in words
    assert "0 to 2 1 1 4 2 of 2" in words
    assert "num_local_experts 6 → 2" in words
    assert "different: config, experts" in words
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = command("diff", before, after).out
        assert max(map(len, shown.splitlines())) <= columns
    assert "✓ the same" in command("diff", before, before).out


def test_for_programs_and_scripts(command: Any, before: Path, after: Path) -> None:
    document = json.loads(command("diff", before, after, "--json").out)
    assert document["experts"]["moved"] == 3 and document["same"] is False
    assert document["layers"][0]["experts"][0] == {
        "expert": 0, "was": 5, "status": "moved", "distance": None, "row": True,
        "row_distance": None,
    }  # fmt: skip
    quiet = command("diff", before, after, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "different\n", "")
    assert command("diff", before, before, "-q").out == "same\n"


def test_exit_codes(command: Any, before: Path, after: Path, tmp_path: Path) -> None:
    assert command("diff", before, before, "--exit-code").code == 0
    assert command("diff", before, after, "--exit-code").code == 3
    missing = command("diff", before, tmp_path / "nowhere", "--exit-code")
    assert missing.code == 1 and "there is no folder" in missing.err


def test_the_same_tensor_of_several_layers_is_one_row(
    monkeypatch: pytest.MonkeyPatch, command: Any, before: Path, tmp_path: Path
) -> None:
    """Its name whole, the layers beside it; also where the shapes changed."""
    other = tmp_path / "other"
    lively_checkpoint("qwen3_moe", other)
    shown = command("diff", before, other).out
    tensors = shown[shown.index("other tensors") :]
    assert "model.layers.*.self_attn.q_norm.weight" in tensors
    assert tensors.count("q_norm") == 1 and "0 to 2" in tensors
