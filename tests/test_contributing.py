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
from dense import dense_llama

import moe_compose as mc
from moe_compose import architectures
from moe_compose.architectures import Architecture, all_architectures
from moe_compose.runtime import Runner
from moe_compose.surgery.plan import Plan

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    return lambda heading: carried_out(heading, monkeypatch)


def carried_out(heading: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Python under a heading defines."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    [block] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module = ModuleType("contributing")
    monkeypatch.setitem(sys.modules, "contributing", module)
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


def test_places_exist() -> None:
    for path in re.findall(r"`((?:examples|tests|moe_compose|cli)/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
