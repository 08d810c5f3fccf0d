"""Recipes: the same names as everywhere, every fault with its line, plans chained without writing.

pytest tests/recipe/test_recipe.py
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest
from moe_compose_cli.main import app
from typer.main import get_command

import moe_compose as mc
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.recipe.reading import parse_recipe
from moe_compose.recipe.running import run_recipe
from moe_compose.recipe.schema import schema
from moe_compose.recipe.steps import STEPS
from moe_compose.recipe.values import attribute_docs
from moe_compose.surgery.compose_options import PRESETS
from moe_compose.surgery.merge_options import MergeMethod
from moe_compose.surgery.upcycle_options import METHODS
from moe_compose.training.options import Objective

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
    """A working folder with the examples and the texts in it."""
    for name in ("examples", "moe_compose", "README.md", "CONTRIBUTING.md"):
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


def test_every_operation_and_method_has_an_example() -> None:
    steps = [s for p in RECIPES for s in mc.read_recipe(p).steps]
    assert {s.operation for s in steps} == set(STEPS)

    def used(operation: str, field: str) -> set[str]:
        return {getattr(s.options, field) for s in steps if s.operation == operation}

    assert used("upcycle", "method") == set(METHODS)
    assert used("compose", "preset") == set(PRESETS)
    assert used("merge", "method") == set(get_args(MergeMethod))
    assert used("train-router", "objective") == set(get_args(Objective))


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
        (
            "steps: [{operation: upcycle, source: 3}]\noutput: o",
            "a folder, a name on the Hub, or steps.N",
        ),
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


#: Flags about how a command is carried out, or what it shows; in a recipe, `run` has them.
OF_RUN = {"resume", "overwrite", "dry_run", "as_json", "quiet", "save_recipe", "explain", "help"}

#: Flags and arguments that stand beside the steps of a recipe, or under another name.
BESIDE = {"shard_size", "validate", "push_to_hub", "private"}
ARGUMENTS = {"output": "save", "page": "out"}


def keys_of(command: str) -> dict[str, Any]:
    """A command's flags and arguments under the names that recipes know them by."""
    group: Any = get_command(app)
    found = {}
    for p in group.commands[command].params:
        flag = next((o for o in p.opts if o.startswith("--")), "")
        key = flag[2:].replace("-", "_") if flag else ARGUMENTS.get(p.name, p.name)
        if p.name not in OF_RUN | BESIDE:
            found[key] = p
    return found


@pytest.mark.parametrize("name", [n for n in STEPS if n != "refit"])
def test_keys_are_flags(name: str) -> None:
    """A step can be told what its command can be told, and nothing else."""
    step, flags = STEPS[name], keys_of(name)
    keys = {f.name for f in step.fields} | set(step.inputs)
    writes_text = step.makes == "plan" and "data" not in step.inputs  # --data: to compare on
    assert keys == set(flags) - ({"data"} if writes_text else set())
    for field in step.fields:
        assert flags[field.name].help == attribute_docs(step.options_class)[field.name]


@pytest.mark.parametrize("name", STEPS)
def test_keys_are_fields(name: str) -> None:
    """Nothing hides behind another of the same name; the schema says what docstrings say."""
    step = STEPS[name]
    own = {f.name for f in step.fields}
    assert not own & set(step.inputs)
    [made] = [s for s in schema()["properties"]["steps"]["items"]["oneOf"] if s["title"] == name]
    docs = attribute_docs(step.options_class) if step.options_class else {}
    for field in own:
        assert made["properties"][field]["description"] == docs[field]


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
