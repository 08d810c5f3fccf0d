"""`inspect`, `validate` and `ls`: the three modes side by side.

Run: pytest tests/cli/test_commands.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hand_made import Make

from moe_compose import validation
from moe_compose.validation.report import Agreement, Check, Receipt, ValidationReport

FINE = ValidationReport(
    checkpoint="x", checks=(Check("a", "pass", "[b]fine"), Check("b", "warn", "look"))
)
MEASURED = ValidationReport(
    checkpoint="x",
    checks=FINE.checks,
    receipt=Receipt(
        "dense", "text", 9, (Agreement("float32", 0, 0, 0, 0, 1, 2, 2, 3),), "exact", True, "so"
    ),
)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_inspect(command: Any, make: Make, kind: str) -> None:
    folder = make(kind, name="[red]m").path
    screen = command("inspect", folder)
    assert screen.code == 0
    assert "[red]m" in screen.out
    assert screen.err == ""
    document = json.loads(command("inspect", folder, "--json").out)
    assert f"{document['parameters']['total']:,}" in screen.out
    assert document["checkpoint"] == "[red]m"
    if kind == "mixtral":
        assert document["experts"]["routing"] in " ".join(screen.out.split())
        assert "mixture of experts" in screen.out
    quiet = command("inspect", folder, "-q").out
    total, active = document["parameters"]["total"], document["parameters"]["active"]
    name = {"llama": "dense", "mixtral": "moe"}[kind]
    assert quiet == f"[red]m\t{kind}\t{name}\t{total}\t{active}\n"


def test_inspect_an_unknown_family(command: Any, make: Make) -> None:
    folder = make(model_type="newcomer").path
    screen = command("inspect", folder)
    assert screen.code == 0
    assert "unknown family" in screen.out
    document = json.loads(command("inspect", folder, "--json").out)
    assert document["family"]["kind"] == "unknown"
    assert document["experts"] is None


def test_no_line_is_wider_than_the_screen(
    command: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("mixtral").path
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        for words in (("inspect", folder), ("ls", "architectures"), ("ls", "methods")):
            lines = command(*words).out.splitlines()
            assert max(map(len, lines)) <= width


def test_names_cannot_move_the_cursor(command: Any, make: Make) -> None:
    ran = command("inspect", make(name="a\x1b[2Jb", model_type="\x1b]0;title\x07").path)
    assert "\x1b" not in ran.out + ran.err
    assert "a\\x1b[2Jb" in ran.out


def test_validate(command: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def validate(checkpoint: Any, **rest: Any) -> ValidationReport:
        given.update(rest, checkpoint=checkpoint.label)
        return MEASURED if rest["against"] else FINE

    monkeypatch.setattr(validation, "validate", validate)
    folder, source = make().path, make(name="source").path
    (folder / "moe_compose.json").write_text("[]")
    screen = command("validate", folder)
    assert screen.code == 0
    for text in ("✓ a", "[b]fine", "! b", "✓ valid"):
        assert text in screen.out
    assert "receipt" not in screen.out
    ran = command("validate", folder, "--against", source, "--tokens", "9", "--json")
    assert json.loads(ran.out)["receipt"]["tokens"] == 9
    assert (given["against"].label, given["tokens"]) == ("source", 9)
    assert json.loads((folder / "validation.json").read_text())["receipt"]
    assert command("validate", folder, "-q").out == "ok\n"
    assert "is kept" in command("validate", folder).err
    assert json.loads((folder / "validation.json").read_text())["receipt"]


def test_validate_a_broken_checkpoint_exits_3(command: Any, make: Make) -> None:
    """A real validation: every weight is zero, as in a checkpoint that was never filled."""
    folder = make().path
    ran = command("validate", folder)
    assert ran.code == 3, ran.out
    assert "✗ not valid" in ran.out
    assert command("validate", folder, "-q").out == "not ok\n"
    assert not (folder / "validation.json").exists(), "nobody else's folder is written into"
    (folder / "moe_compose.json").write_text("[]")
    assert command("validate", folder, "-q").code == 3
    assert json.loads((folder / "validation.json").read_text())["ok"] is False


@pytest.mark.parametrize("what", ["architectures", "methods"])
def test_ls(command: Any, what: str) -> None:
    screen = command("ls", what)
    rows = json.loads(command("ls", what, "--json").out)
    names = command("ls", what, "-q").out.split()
    key = {"architectures": "family", "methods": "method"}[what]
    assert [row[key] for row in rows] == names
    assert all(name in screen.out for name in names)


def test_ls_something_else(command: Any) -> None:
    ran = command("ls", "nothing")
    assert ran.code == 2
    assert "architectures" in ran.err


def test_the_rest_of_the_first_steps(command: Any, tmp_path: Path) -> None:
    from moe_compose import __version__

    assert command("--version").out == f"moe-compose {__version__}\n"
    bare = command()
    assert bare.code == 2
    assert "upcycle" in bare.out
    assert command("nonsense").code == 2
    assert command("inspect", tmp_path / "nowhere").code == 1


@pytest.mark.parametrize("words", [("prune", "a"), ("--foo",), ("nonsense",)])
def test_wrong_usage_is_one_document_too(command: Any, words: tuple[str, ...]) -> None:
    ran = command(*words, "--json")
    assert json.loads(ran.out)["error"]["exit_code"] == ran.code == 2
