"""`moe-compose run`, and `--save-recipe` of the commands that write.

pytest tests/cli/test_run.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPE = """\
steps:
  - operation: upcycle
    source: "{dense}"
    num_experts: 4
  - operation: expand
    factor: 2
output: {out}
"""


@pytest.fixture
def recipe(dense: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(dense=dense, out=tmp_path / "out"))
    return path


def test_for_people(command: Any, recipe: Path, tmp_path: Path) -> None:
    ran = command("run", recipe)
    assert ran.code == 0, ran.err
    for text in ("upcycle  → (next step)", "upcycle + expand  → ", "exact", "✓ valid"):
        assert text in ran.out
    assert "step 2 of 2: expand" in ran.err
    assert (tmp_path / "out" / "validation.json").is_file()


def test_for_programs(command: Any, recipe: Path, tmp_path: Path) -> None:
    ran = command("run", recipe, "--json", "--set", "steps.1.factor=3")
    document = json.loads(ran.out)
    assert ran.code == 0
    assert document["steps"] == ["upcycle", "expand"]
    assert document["written"][0]["validation"]["ok"] is True
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (12, 6)


def test_dry_run_and_quiet(command: Any, recipe: Path, tmp_path: Path) -> None:
    ran = command("run", recipe, "--dry-run")
    assert ran.code == 0
    assert "num_experts: 4" in ran.out
    assert not (tmp_path / "out").exists()
    assert command("run", recipe, "--quiet").out == f"{tmp_path / 'out'}\n"
    again = command("run", recipe)
    assert again.code == 1
    assert "--overwrite" in again.err
    assert command("run", recipe, "--quiet", "--resume").code == 0


def test_a_faulty_recipe(command: Any, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("num_experts", "num_expert"))
    ran = command("run", recipe)
    assert ran.code == 2
    assert "recipe.yaml:4  steps.0.num_expert: unknown option 'num_expert'" in ran.err
    assert "did you mean 'num_experts'?" in ran.err
    assert command("run", "absent.yaml").code == 2
    assert command("run").code == 2


def test_the_schema(command: Any) -> None:
    assert json.loads(command("run", "--schema").out)["title"] == "moe-compose recipe"


LINES = [
    ("upcycle", ["--num-experts", "4", "--method", "drop"], {"num_experts": 4, "method": "drop"}),
    ("expand", ["--factor", "3"], {"factor": 3}),
    ("remove-expert", ["--expert", "0"], {"expert": ["0"]}),
    ("add-expert", ["--from", "copy:1", "--name", "law"], {"from": "copy:1", "name": "law"}),
    ("prune", ["--keep", "3", "--criterion", "random"], {"keep": 3, "criterion": "random"}),
]


@pytest.mark.parametrize(("verb", "words", "said"), LINES, ids=[x[0] for x in LINES])
def test_a_saved_recipe_does_the_same(
    verb: str, words: list[str], said: dict[str, Any], command: Any, dense: Path, tmp_path: Path
) -> None:
    """What the command wrote, `run` writes again."""
    source, file = dense, tmp_path / "saved.yaml"
    if verb != "upcycle":
        source = tmp_path / "moe"
        assert command("upcycle", dense, source, "--num-experts", "5", "--no-validate").code == 0
    out = tmp_path / "out"
    ran = command(verb, source, out, *words, "--no-validate", "--save-recipe", file)
    assert ran.code == 0, ran.err
    saved = yaml.safe_load(file.read_text())
    step = {"operation": verb, "source": str(source), **said}
    assert saved == {"steps": [step], "output": str(out), "validate": False}
    before = (out / "model.safetensors").read_bytes()
    assert command("run", file, "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() == before


def test_what_recipes_cannot_say(command: Any, dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.yaml"
    words = ("--keep", "2", "--max-kl", "0.1", "--data", "x.txt", "--save-recipe", file)
    ran = command("prune", dense, tmp_path / "out", *words)
    assert ran.code == 2
    assert "recipes cannot say this" in ran.err
    assert not file.exists()
