"""The ladder of `examples/compose_ladder.py`, small: every rung holds on real small models.

    pytest tests/composition/test_ladder.py

Controls: the expert's own domain pays for its removal, rows of experts in another order, an
artifact for another base.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutant
from pruned import raw

import moe_compose as mc
from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.kept import STATS_PLACE, stats_of

DATA = Path(__file__).parents[3] / "shared" / "data"
SCRIPT = Path(__file__).parents[2] / "examples" / "compose_ladder.py"
GATE = "model.layers.{}.block_sparse_moe.gate.weight"
OLD = ("base", "py", "math")


def loaded(path: Path) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data: real small models and text")
    return loaded(SCRIPT)


@pytest.fixture(scope="module")
def ladder(script: Any) -> Any:
    """So few tokens that all of this takes seconds; rows of length 1, nothing held out."""
    return script.Ladder(DATA, tokens=2048, held=1024, row_scale=1.0)


@pytest.fixture(scope="module")
def held(ladder: Any) -> Any:
    return ladder.texts("valid")


@pytest.fixture(scope="module")
def four(ladder: Any, tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    """The seed and three anchored experts, routed by ridge."""
    return mc.write(ladder.composed("anchored", "ridge"), tmp_path_factory.mktemp("four") / "moe")


@pytest.fixture(scope="module")
def three(ladder: Any, tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    """Without `de`."""
    plan = ladder.composed("anchored", "ridge", names=OLD)
    return mc.write(plan, tmp_path_factory.mktemp("three") / "moe")


@pytest.fixture(scope="module")
def added(script: Any, ladder: Any, three: mc.Checkpoint, tmp_path_factory: Any) -> mc.Checkpoint:
    """`de` beside them, all rows solved again."""
    plan = mc.add_expert(
        three,
        ladder.model("anchored_de"),
        mc.AddOptions(name="de", rows="all"),
        ladder.texts("train", ("de",)),
        routing=ladder.routing,
    )
    return mc.write(plan, tmp_path_factory.mktemp("added") / "moe")


def same_tensors(a: TensorSource, b: TensorSource, names: Any = None) -> bool:
    if names is None and set(a.tensors) != set(b.tensors):
        return False
    return all(torch.equal(a.read(n), b.read(n)) for n in names or a.tensors)


def test_ridge_then_hidden_then_random(ladder: Any, four: mc.Checkpoint, held: Any) -> None:
    losses = [
        ladder.loss(plan, held)["mean"]
        for plan in (four, *(ladder.composed("anchored", r) for r in ("hidden", "random")))
    ]
    assert losses[0] < losses[1] - 0.01 < losses[2] - 0.05, losses


def test_only_its_own_domain_pays_for_opting_out(
    script: Any, ladder: Any, four: mc.Checkpoint, held: Any
) -> None:
    before = ladder.loss(four, held)
    rises = script.change(before, ladder.loss(script.opted_out(four), held))
    assert rises["de"] > 0.2, rises
    assert max(rises[d] for d in ("en", "py", "math")) < 0.02, rises


def test_old_domains_pay_the_tolerance_at_most(
    script: Any, ladder: Any, three: mc.Checkpoint, held: Any
) -> None:
    """On validation text, of which the search has seen nothing."""
    searched = script.Ladder(DATA, tokens=1024, held=1024, tolerance=0.02)
    plan = script.added(searched, three)
    rises = script.change(ladder.loss(three, held), ladder.loss(plan, held))
    assert rises["de"] < -0.2, rises
    assert max(rises[d] for d in ("en", "py", "math")) <= searched.tolerance, rises
    tried = plan.reports["routing_search.json"]
    assert tried["within"] and tried["chosen"] < tried["scales"][-1]
    longest = max(tried["losses"][-1][n] - tried["without"][n] for n in OLD)
    assert longest > searched.tolerance


def test_one_after_another_is_all_at_once(four: mc.Checkpoint, added: mc.Checkpoint) -> None:
    """Sums of the old experts were kept without their text, and the system is solved again."""
    for layer in range(int(four.config["num_hidden_layers"])):
        joint, one_by_one = (m.read(GATE.format(layer)) for m in (four, added))
        assert torch.allclose(joint, one_by_one, atol=1e-5)
        assert not torch.allclose(joint.roll(1, 0), one_by_one, atol=1e-1)
    others = [n for n in four.tensors if not n.endswith("gate.weight")]
    assert same_tensors(four, added, others)
    assert four.config == added.config
    kept, again = stats_of(four), stats_of(added)
    assert kept is not None and again is not None
    assert [(e.name, e.tokens, e.text) for e in kept.experts] == [
        (e.name, e.tokens, e.text) for e in again.experts
    ]


def test_add_then_remove_leaves_nothing(
    ladder: Any, three: mc.Checkpoint, tmp_path: Path, script: Any
) -> None:
    """The same tensors, config, and bytes of statistics."""
    plan = script.added(ladder, three)
    grown = mc.write(plan, tmp_path / "grown")
    again = mc.write(mc.remove_expert(grown, mc.RemoveOptions(expert=("de",))), tmp_path / "again")
    assert set(again.tensors) == set(three.tensors)
    assert all(raw(again, n) == raw(three, n) for n in three.tensors)
    assert again.config == three.config != grown.config
    statistics = [(m.path / STATS_PLACE).read_bytes() for m in (again, three, grown)]
    assert statistics[0] == statistics[1] != statistics[2]


def test_other_experts_keep_their_bytes(three: mc.Checkpoint, added: mc.Checkpoint) -> None:
    """Also where all rows are solved again; the rows themselves are others then."""
    own = [n for n in three.tensors if not n.endswith("gate.weight")]
    assert len(own) > 60
    assert all(raw(three, n) == raw(added, n) for n in own)
    rows = GATE.format(0)
    assert not torch.equal(three.read(rows), added.read(rows)[:3])


def test_an_artifact_is_as_good_as_its_source(
    script: Any, ladder: Any, three: mc.Checkpoint, added: mc.Checkpoint, tmp_path: Path
) -> None:
    packed = mc.write(script.pack(ladder), tmp_path / "packed")
    plan = mc.add_expert(three, packed, mc.AddOptions(name="de", rows="all"))
    again = mc.write(plan, tmp_path / "again")
    assert all(raw(again, n) == raw(added, n) for n in added.tensors)
    assert again.config == added.config
    statistics = [(m.path / STATS_PLACE).read_bytes() for m in (again, added)]
    assert statistics[0] == statistics[1]
    assert not any(p.suffix == ".txt" for p in packed.path.rglob("*"))

    def drift(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] += 1e-3

    other = mutant(three, tmp_path / "other", drift)
    with pytest.raises(mc.UnsupportedError, match="was packed for another base"):
        mc.add_expert(other, packed, mc.AddOptions(name="de"))
