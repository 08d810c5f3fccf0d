"""Recipes: the same names as everywhere, every fault with its line, plans chained without writing.

pytest tests/recipe/test_recipe.py
"""

from __future__ import annotations

import json
import os
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from moe_compose_cli.parameters import attribute_docs

import moe_compose as mc
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import MoeComposeError, OptionError
from moe_compose.recipe.reading import parse_recipe
from moe_compose.recipe.running import Event, run_recipe
from moe_compose.recipe.schema import schema
from moe_compose.recipe.steps import STEPS, inputs_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
MODEL = ROOT / "examples" / "models" / "stories260K"

BAD = """\
steps:
  - operation: upcycle
    source: model
    num_expert: 8
    top_k: two
  - operation: prun
  - operation: prune
    keep: 4
    assert:
      max_lk: 1
output: out
validte: false
"""


def content(source: TensorSource) -> dict[str, bytes]:
    return {n: source.read(n).contiguous().numpy().tobytes() for n in source.tensors}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the examples and the sample text in it."""
    for name in ("examples", "moe_compose"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_its_script(path: Path, here: Path) -> None:
    """The same bytes and config from the YAML and from the Python beside it."""
    recipe = mc.read_recipe(path, ["validate=false"])
    [*_, last] = run_recipe(recipe)
    by_recipe, config = content(last.checkpoint), dict(last.checkpoint.config)
    for done in (here / "out").iterdir():
        done.rename(here / f"recipe-{done.name}")
    runpy.run_path(str(path.with_suffix(".py")), run_name="__main__")
    by_script = mc.Checkpoint.open(here / recipe.output)
    assert content(by_script) == by_recipe
    assert dict(by_script.config) == config


def test_every_operation_has_an_example() -> None:
    used = {s.operation for p in RECIPES for s in mc.read_recipe(p).steps}
    assert used == set(STEPS)


def test_every_fault_with_its_line() -> None:
    with pytest.raises(OptionError) as caught:
        parse_recipe(BAD, "bad.yaml")
    assert list(caught.value.problems) == [
        "bad.yaml:12  validte: unknown option 'validte'; did you mean 'validate'?",
        "bad.yaml:4  steps.0.num_expert: unknown option 'num_expert'; did you mean 'num_experts'?",
        "bad.yaml:5  steps.0.top_k: must be a whole number ('two')",
        "bad.yaml:6  steps.1.operation: unknown operation 'prun'; did you mean 'prune'?",
        "bad.yaml:10  steps.2.assert.max_lk: unknown option 'max_lk'; did you mean 'max_kl'?",
        "bad.yaml:9  steps.2.assert.data: is missing: Held-out text.",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [", "is no YAML"),
        ("", "a recipe is a mapping"),
        ("output: out", "must be a list of steps"),
        ("steps: [{operation: prune, keep: 2}]", "output: is missing"),
        ("steps: [{operation: prune, keep: 2}]\noutput: o", "the first step needs one"),
        ("steps: [{operation: upcycle, source: 3}]\noutput: o", "a folder, or a name on the Hub"),
        ("steps: [{operation: swap-expert, source: m}]\noutput: o", "steps.0.expert: is missing"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_recipe(text)
    assert said in str(caught.value)


def test_entries_are_set() -> None:
    text = "steps: [{operation: upcycle, source: m}]\noutput: o"
    recipe = parse_recipe(text, "r", ["steps.0.top_k=4", "steps.0.num_experts=16", "output=p"])
    assert (recipe.steps[0].options.top_k, recipe.steps[0].options.num_experts) == (4, 16)
    assert recipe.output == Path("p")
    with pytest.raises(OptionError, match="the recipe has no 7"):
        parse_recipe(text, "r", ["steps.7.top_k=4"])
    with pytest.raises(OptionError) as caught:
        parse_recipe(text, "r", ["steps.0.topk=4"])
    assert "--set  steps.0.topk: unknown option" in str(caught.value)


def test_a_condition_that_does_not_hold(tmp_path: Path) -> None:
    """What was saved before stays, nothing else is written, and the step is named."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who had a red ball. " * 20)
    recipe = parse_recipe(
        f"""
steps:
  - operation: upcycle
    source: {MODEL}
    num_experts: 4
    method: drop
    save: {tmp_path / "saved"}
  - operation: prune
    keep: 2
    criterion: random
    assert: {{max_kl: 0.000001, data: {text}, tokens: 64}}
output: {tmp_path / "out"}
validate: false
""",
        "r.yaml",
    )
    events: list[Event] = []
    with pytest.raises(MoeComposeError, match=r"r.yaml:8  steps.1 \(prune\): a condition") as e:
        run_recipe(recipe, tell=events.append)
    assert "at most 1e-06" in e.value.problems[0]
    assert (tmp_path / "saved" / "config.json").is_file()
    assert not (tmp_path / "out").exists()
    assert [x.step for x in events if x.written] == [0]


def test_chained_is_one_after_another(tmp_path: Path) -> None:
    """A fused chain gives what its steps give when each is written and read again."""
    chain = """
steps:
  - {{operation: upcycle, source: {model}, num_experts: 6, method: drop}}
  - {{operation: prune, keep: 4, criterion: random, seed: 3{save}}}
  - {{operation: expand, factor: 2}}
output: {out}
validate: false
"""
    found = {}
    for name, save in (("fused", ""), ("apart", f", save: {tmp_path / 'between'}")):
        text = chain.format(model=MODEL, save=save, out=tmp_path / name)
        found[name] = run_recipe(parse_recipe(text))[-1].checkpoint
    assert (tmp_path / "between" / "config.json").is_file()
    assert content(found["fused"]) == content(found["apart"])
    history = json.loads((tmp_path / "fused" / "moe_compose.json").read_text())
    assert [r["operation"] for r in history] == ["upcycle", "prune", "expand"]


@pytest.mark.parametrize("name", STEPS)
def test_keys_are_fields_and_flags(name: str) -> None:
    """Recipe key = field = keyword = flag; nothing hides behind another of the same name."""
    step = STEPS[name]
    assert step.options_class is not None
    own = {f.name for f in fields(step.options_class)}
    assert not own & set(inputs_of(step))
    [made] = [s for s in schema()["properties"]["steps"]["items"]["oneOf"] if s["title"] == name]
    said = {f.name: made["properties"][f.name]["description"] for f in fields(step.options_class)}
    assert said == attribute_docs(step.options_class)


def test_the_schema_knows_every_key() -> None:
    made = schema()
    kinds = {s["title"]: s for s in made["properties"]["steps"]["items"]["oneOf"]}
    assert set(kinds) == set(STEPS)
    upcycle = kinds["upcycle"]["properties"]
    assert upcycle["num_experts"]["type"] == "integer"
    assert "drop" in upcycle["method"]["enum"]
    assert kinds["swap-expert"]["required"] == ["operation", "expert", "from"]
    assert all(
        p["description"]
        for p in upcycle.values()
        if {"const", "additionalProperties"}.isdisjoint(p)
    )
    json.dumps(made)


def test_the_schema_accepts_the_examples() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    yaml: Any = pytest.importorskip("yaml")
    for path in RECIPES:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(BAD), schema())
