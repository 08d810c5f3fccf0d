"""`--help`: groups, summaries in full, no flag broken at its hyphen.

Run: pytest tests/cli/test_help.py
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from moe_compose_cli.main import _COMMANDS


def names() -> list[str]:
    commands = [c.__name__.replace("_", "-") for group in _COMMANDS.values() for c in group]
    return ["run" if name == "run-recipe" else name for name in commands]


def test_every_command_is_in_a_group_with_its_summary_in_full(command: Any) -> None:
    shown = command("--help").out
    assert "..." not in shown.replace("[ARGS]...", "")
    for name in names():
        assert re.search(rf"^  {name} +\S", shown, re.M), name
    for group in _COMMANDS:
        assert f"\n{group}:\n" in shown


@pytest.mark.parametrize("name", names())
def test_pages_fit_and_flags_stay_whole(
    command: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shown = command(name, "--help").out
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"(--\w+|moe)-$", shown, re.M)
    assert "<" not in shown and "{" not in shown.partition("\n")[0]
    monkeypatch.setenv("COLUMNS", "120")
    assert len(command(name, "--help").out.splitlines()) <= len(shown.splitlines())


def test_what_a_command_needs_comes_first_and_what_all_share_last(command: Any) -> None:
    shown = command("compose", "--help").out
    order = [shown.index(x) for x in ("--base ", "--top-k", "--data", "--dry-run", "--json")]
    assert order == sorted(order)
    assert command("add-expert", "-h").out.startswith(
        "Usage: moe-compose add-expert SOURCE OUTPUT --from DONOR [OPTIONS]"
    )
    headings = re.findall(r"^(\w.*):$", command("prune", "-h").out, re.M)
    assert headings == ["Arguments", "Options", "Recovery", "Text", "Output", "What is shown"]
