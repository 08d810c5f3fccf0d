"""CONTRIBUTING.md says what works: its code is carried out as it stands.

pytest tests/test_contributing.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from dense import dense_llama
from typer.main import get_command

import moe_compose as mc
from moe_compose import architectures
from moe_compose.architectures import Architecture, all_architectures
from moe_compose.recipe import reading, schema, steps
from moe_compose.recipe.reading import RecipeStep, parse_recipe
from moe_compose.recipe.steps import OPTIONS, STEPS
from moe_compose.runtime import Runner
from moe_compose.surgery.plan import Plan

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    return lambda heading: carried_out(heading, monkeypatch)


def carried_out(
    heading: str, monkeypatch: pytest.MonkeyPatch, number: int = 0, **names: Any
) -> dict[str, Any]:
    """What a block of Python under a heading defines, given some names."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    block = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]
    module = ModuleType("contributing")
    monkeypatch.setitem(sys.modules, "contributing", module)
    vars(module).update(names)
    exec(compile(block, f"CONTRIBUTING.md: {heading}", "exec"), vars(module))
    return vars(module)


def logits(source: Any) -> torch.Tensor:
    found: dict[int, torch.Tensor] = {}
    Runner(source).run([torch.arange(24)[None]], logits=found.__setitem__)
    return found[0]


@pytest.fixture
def moe(tmp_path: Path) -> mc.Checkpoint:
    """Three experts that differ."""
    dense = dense_llama(tmp_path / "dense")
    options = mc.UpcycleOptions(num_experts=3, method="noise", router_std=1.0)
    return mc.write(mc.upcycle(dense, options), tmp_path / "moe")


def test_add_a_family(code: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is taken by every operation: grown from a Llama, pruned, and counted."""
    form = code("Add a family")["EXAMPLE_MOE"]
    assert isinstance(form, Architecture)
    known = {**all_architectures(), form.model_type: form}
    monkeypatch.setattr(architectures, "all_architectures", lambda: known)
    dense = dense_llama(tmp_path / "dense")
    plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, target="example_moe"))
    assert plan.config["model_type"] == "example_moe"
    assert plan.preservation.kind == "exact"
    small = mc.prune(plan, None, mc.PruneOptions(keep=3, criterion="random"))
    assert small.config["num_local_experts"] == 3
    runs = replace(small, config={**small.config, "model_type": "mixtral"})
    assert torch.allclose(logits(runs), logits(dense), atol=1e-5)


def test_add_an_operation(code: Any, moe: mc.Checkpoint) -> None:
    """The order changes, the function does not; with a row left behind it would."""
    found = code("Add an operation")
    plan = found["reverse"](moe, found["ReverseOptions"]())
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert isinstance(plan, Plan)
    assert torch.equal(plan.read(name.format(0)), moe.read(name.format(2)))
    assert torch.allclose(logits(plan), logits(moe), atol=1e-5)
    rows = [o for o in plan.outputs if "gate.weight" in o.name]
    broken = replace(
        plan, outputs=tuple(replace(o, value=o.value.x) if o in rows else o for o in plan.outputs)
    )
    assert not torch.allclose(logits(broken), logits(moe), atol=1e-3)
    twice = found["reverse"](plan, found["ReverseOptions"]())
    assert all(torch.equal(twice.read(n), moe.read(n)) for n in moe.tensors)


def test_add_a_step_and_a_command(
    moe: mc.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of that page: `reverse` runs from a recipe, and from a command line."""
    heading = "Add an operation"
    module = carried_out(heading, monkeypatch)
    place = ModuleType("moe_compose.surgery.reverse")
    vars(place).update({n: module[n] for n in ("reverse", "ReverseOptions")})
    monkeypatch.setitem(sys.modules, place.__name__, place)
    monkeypatch.setattr(steps, "STEPS", dict(STEPS))
    for user in (reading, schema, sys.modules[RecipeStep.__module__]):
        monkeypatch.setattr(user, "STEPS", steps.STEPS)
    monkeypatch.setattr(steps, "OPTIONS", dict(OPTIONS))
    names = {n: getattr(steps, n) for n in ("STEPS", "OPTIONS", "operation", "plain")}
    carried_out(heading, monkeypatch, 1, **names)
    text = f"steps: [{{operation: reverse, source: {moe.path}}}]\noutput: {tmp_path / 'out'}"
    [done] = mc.run_recipe(parse_recipe(f"{text}\nvalidate: false"))
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    assert torch.equal(done.checkpoint.read(name.format(0)), moe.read(name.format(2)))

    from moe_compose_cli.commands import _steps, _surgery, _writing
    from moe_compose_cli.parameters import Moe, Output, with_options

    names = {"with_writing": _writing.with_writing, "with_options": with_options, "Moe": Moe}
    names |= {"How": _surgery.How, "carry_out": _surgery.carry_out, "step": _steps.step}
    names |= {"Output": Output, "ReverseOptions": place.ReverseOptions}
    app = typer.Typer()
    app.command()(carried_out(heading, monkeypatch, 2, **names)["reverse"])
    words = [str(moe.path), str(tmp_path / "again"), "--times", "2", "--no-validate"]
    get_command(app).main(args=words, standalone_mode=False)
    again = mc.Checkpoint.open(tmp_path / "again")
    assert all(torch.equal(again.read(n), moe.read(n)) for n in moe.tensors)


def test_places_exist() -> None:
    for path in re.findall(r"`((?:examples|tests|moe_compose|cli)/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
