"""`moe-compose run`, and `--save-recipe` of the commands that write.

pytest tests/cli/test_run.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"

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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little dog who liked to run. " * 20)
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
    assert re.search(r"num_experts +4\s", ran.out) and "→" in ran.out
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


def test_flags_beside_the_step_are_saved(
    command: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where and how a result is written, and a flag that turns something off."""
    monkeypatch.setenv("HF_TOKEN", "none")
    file, text = tmp_path / "saved.yaml", tmp_path / "text.txt"
    text.write_text("Once upon a time.")
    words = ("--base", dense, "--expert", f"law={dense}", "--no-base-expert", "--top-k", "1")
    more = ("--shard-size", "1MB", "--push-to-hub", "me/law", "--private", "--dry-run")
    ran = command("compose", tmp_path / "out", *words, *more, "--save-recipe", file)
    assert ran.code == 0, ran.err
    saved = yaml.safe_load(file.read_text())
    [step] = saved.pop("steps")
    assert step["base_expert"] is False and step["expert"] == [f"law={dense}"]
    assert saved == {
        "output": str(tmp_path / "out"),
        "shard_size": 10**6,
        "push_to_hub": "me/law",
        "private": True,
    }
    file.unlink()
    ran = command("upcycle", dense, tmp_path / "out", "--data", text, "--save-recipe", file, "-q")
    assert yaml.safe_load(file.read_text())["data"] == str(text)


FINDINGS = [
    ("calibrate", ("out/stats", "--tokens", "64"), {"save": "out/stats", "tokens": 64}),
    ("evaluate", ("--out", "out/x.json"), {"out": "out/x.json"}),
]


@pytest.mark.parametrize(("verb", "words", "said"), FINDINGS, ids=[x[0] for x in FINDINGS])
def test_a_recipe_of_what_makes_no_model(
    verb: str, words: tuple, said: dict, command: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("Once upon a time there was a red ball. " * 30)
    ran = command("upcycle", STORIES, "moe", "--num-experts", "2", "--no-validate")
    assert ran.code == 0, ran.err
    ran = command(verb, "moe", *words, "--data", "t.txt", "--save-recipe", "saved.yaml")
    assert ran.code == 0, ran.err
    [step] = yaml.safe_load((tmp_path / "saved.yaml").read_text())["steps"]
    assert step == {"operation": verb, "source": "moe", "data": ["t.txt"], **said}
    ran = command("run", "saved.yaml", "--overwrite", "--json")
    assert ran.code == 0, ran.err
    [found] = json.loads(ran.out)["found"]
    assert found["operation"] == verb
    if verb == "evaluate":
        assert found["result"] == json.loads((tmp_path / "out" / "x.json").read_text())


def test_a_recipe_that_is_there_stays(command: Any, dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.yaml"
    file.write_text("mine")
    ran = command("upcycle", dense, tmp_path / "out", "--save-recipe", file)
    assert ran.code == 2 and "is there" in ran.err
    assert file.read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_condition_that_does_not_hold_exits_4(command: Any, tmp_path: Path, text: Path) -> None:
    """It is no missing model (1) and no faulty recipe (2); where it holds the code is 0."""
    steps = (
        f"- {{operation: upcycle, source: {STORIES}, num_experts: 4, "
        f"assert: {{max_loss_worst: @, data: {{a: {text}}}, tokens: 64}}}}"
    )
    recipe = tmp_path / "r.yaml"
    codes = {}
    for limit in (99, 0.01):
        recipe.write_text(
            f"steps:\n{steps.replace('@', str(limit))}\noutput: {tmp_path / str(limit)}\n"
            "validate: false\n"
        )
        codes[limit] = command("run", recipe, "--json")
    assert codes[99].code == 0, codes[99].err
    error = json.loads(codes[0.01].out)["error"]
    assert (codes[0.01].code, error["exit_code"], error["type"]) == (4, 4, "ConditionError")
    assert "of a" in error["problems"][0]
    assert not (tmp_path / "0.01").exists()
