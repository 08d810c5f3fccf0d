"""`moe-compose report`, and the history and names that `inspect` shows.

Run: pytest tests/cli/test_report.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hand_made import Make, plan_of

import moe_compose as mc

PROBE = """
import sys
from moe_compose_cli.main import run
assert run(["inspect", sys.argv[1]]) == 0
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""


def chain(make: Make, folder: Path) -> Path:
    """Composed, and an expert taken out again."""
    plan = mc.compose(make(), {"[b]py": make(name="d1"), "de": make(name="d2")})
    mc.write(mc.remove_expert(plan, mc.RemoveOptions(expert=("de",))), folder)
    return folder


def test_inspect_tells_history_and_names(command: Any, make: Make, tmp_path: Path) -> None:
    folder = chain(make, tmp_path / "chain")
    words = " ".join(command("inspect", folder).out.split())
    assert "names 0 base, 1 [b]py" in words
    assert "history 1. compose of dense, d1, d2" in words
    assert "2. remove-expert of compose of dense, d1, d2 expert de" in words
    assert words.index("1. compose") < words.index("2. remove-expert")
    document = json.loads(command("inspect", folder, "--json").out)
    assert [r["operation"] for r in document["history"]] == ["compose", "remove-expert"]
    assert document["experts"]["names"] == ["base", "[b]py"]
    once = mc.write(plan_of(make(name="seed")), tmp_path / "once")
    assert once.path is not None
    assert "history upcycle of seed" in " ".join(command("inspect", once.path).out.split())
    assert "names" not in command("inspect", once.path).out


def test_history_costs_no_torch(make: Make, tmp_path: Path) -> None:
    folder = chain(make, tmp_path / "chain")
    done = subprocess.run([sys.executable, "-c", PROBE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_report(command: Any, make: Make, tmp_path: Path) -> None:
    folder, page = chain(make, tmp_path / "chain"), tmp_path / "r.html"
    ran = command("report", folder, page)
    assert (ran.code, ran.out) == (0, "") and "opens in any browser" in ran.err
    text = page.read_text(encoding="utf-8")
    assert "remove-expert" in text and "[b]py" in text and str(tmp_path) not in text
    again = command("report", folder, page)
    assert again.code == 1 and "--overwrite" in again.err
    assert command("report", folder, page, "--overwrite", "-q").out == f"{page}\n"
    ran = command("report", folder, tmp_path / "s.html", "--json")
    assert json.loads(ran.out) == {"page": str(tmp_path / "s.html")}


def test_report_of_what_is_none(command: Any, make: Make, tmp_path: Path) -> None:
    folder, page = make("mixtral", name="m").path, tmp_path / "r.html"
    sweep = tmp_path / "sweep.json"
    sweep.write_text("[]")
    wrong = command("report", folder, page, "--sweep", sweep)
    assert wrong.code == 1 and "is no sweep" in wrong.err and not page.exists()
    sweep.write_text(json.dumps({"source": "m", "bytes": 9, "candidates": []}))
    assert command("report", folder, page, "--sweep", sweep).code == 0
    assert "Sweep" in page.read_text(encoding="utf-8")
    assert command("report", folder, tmp_path / "r.pdf").code == 2
    assert command("report", folder, page, "--stats", tmp_path).code == 1
