"""`diff` against tensors compared one by one, on checkpoints whose differences were made by hand.

Run: pytest tests/reporting/test_diff.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import Make, plan_of
from hypothesis import given
from hypothesis import strategies as st
from pruned import lively_checkpoint, selected
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_checkpoint

import moe_compose as mc
from moe_compose.reporting.contents import contents_of
from moe_compose.reporting.diff import diff
from moe_compose.reporting.difference import Difference
from moe_compose.reporting.matching import match
from moe_compose.surgery.history import HISTORY_NAME

#: Experts one by one, and all of a layer in one tensor.
FAMILIES = ("qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module", params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    folder = tmp_path_factory.mktemp("diff") / request.param
    tiny_checkpoint(request.param, folder)
    return mc.Checkpoint.open(folder)


def copy_of(source: mc.Checkpoint, folder: Path, **changed: Any) -> mc.Checkpoint:
    """The checkpoint with what `changed` makes of some tensors: `name__part` → function."""
    assert source.path is not None
    folder.mkdir()
    for path in source.path.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source.path / "model.safetensors")
    for name, change in changed.items():
        tensors[name] = change(tensors[name].copy())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return mc.Checkpoint.open(folder)


def expert_tensor(source: mc.Checkpoint, layer: int, expert: int) -> tuple[str, Any]:
    """The name of an expert's down-projection, and where it lies in that tensor."""
    found = contents_of(source)
    block = sorted(found.experts)[layer]
    [name] = [n for n in found.experts[block][expert] if "down_proj" in n and "bias" not in n]
    piece = found.experts[block][expert][name]
    return piece.name, piece.part if piece.parts else ...


def distance(a: mc.Checkpoint, b: mc.Checkpoint, layer: int, expert: int) -> float:
    """‖b − a‖ / ‖a‖ of an expert in fp64, over all its tensors."""
    one, two = (load_file(x.path / "model.safetensors") for x in (a, b) if x.path)
    found = contents_of(a)
    pieces = found.experts[sorted(found.experts)[layer]][expert].values()
    at = [(p.name, p.part if p.parts else ...) for p in pieces]
    x = np.concatenate([one[n][i].astype(np.float64).ravel() for n, i in at])
    y = np.concatenate([two[n][i].astype(np.float64).ravel() for n, i in at])
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


def statuses(found: Difference) -> list[list[tuple[int | None, int | None, str]]]:
    return [[(e.expert, e.was, e.status) for e in layer.experts] for layer in found.layers]


def test_the_same_and_a_single_bit(moe: mc.Checkpoint, tmp_path: Path) -> None:
    same = diff(moe, copy_of(moe, tmp_path / "same"))
    assert same.same and same.experts.keys() == {"same"} and not same.tensors
    assert same.same_tensors == len(contents_of(moe).others)
    name, at = expert_tensor(moe, 0, 4)

    def flip(x: np.ndarray) -> np.ndarray:
        x[at].view(np.uint32).flat[7] ^= 1
        return x

    other = diff(moe, copy_of(moe, tmp_path / "other", **{name: flip}))
    assert not other.same and not other.config and not other.tensors
    changed = [(i, e) for i, x in enumerate(other.layers) for e in x.experts if e.status != "same"]
    assert [(i, e.expert, e.was, e.status) for i, e in changed] == [(0, 4, 4, "changed")]
    assert 0 < (changed[0][1].distance or 0) < 1e-6


def test_how_far(moe: mc.Checkpoint, tmp_path: Path) -> None:
    name, at = expert_tensor(moe, 0, 2)

    def noise(x: np.ndarray) -> np.ndarray:
        x[at] += np.random.default_rng(0).normal(size=x[at].shape).astype(np.float32)
        return x

    other = copy_of(moe, tmp_path / "b", **{name: noise, "model.norm.weight": lambda x: x * 3})
    found = diff(moe, other)
    expert = found.layers[0].experts[2]
    assert expert.status == "changed" and expert.row is True
    assert expert.distance == pytest.approx(distance(moe, other, 0, 2), rel=1e-12)
    assert found.layers[0].worst() == expert.distance
    [norm] = found.tensors
    assert (norm.name, norm.status) == ("model.norm.weight", "changed")
    assert norm.distance == pytest.approx(2.0)
    assert diff(other, moe).tensors[0].distance == pytest.approx(2 / 3, rel=1e-6)


def test_moved_and_removed(moe: mc.Checkpoint) -> None:
    layers = contents_of(moe).experts
    sparse = [int(block.rpartition(".")[2]) for block in layers]
    plan = selected(moe, dict.fromkeys(sparse, (3, 1, 0)))
    found = diff(moe, plan)
    gone = [(None, e, "removed") for e in (2, 4, 5)]
    expected = [(0, 3, "moved"), (1, 1, "same"), (2, 0, "moved"), *gone]
    assert statuses(found) == [expected] * len(sparse)
    assert all(layer.rows == (3, 3) for layer in found.layers)
    assert not found.tensors and {c.before for c in found.config} >= {6}
    back = diff(plan, moe)
    assert back.experts["added"] == 3 * len(sparse) and back.experts["moved"] == 2 * len(sparse)


def test_rows_of_the_router_alone(moe: mc.Checkpoint, tmp_path: Path) -> None:
    """Training a router changes no expert, and says so row by row."""
    found = contents_of(moe)
    block = sorted(found.rows)[0]
    [weight] = [p.name for n, p in found.rows[block][0].items() if n.endswith("weight")]

    def trained(x: np.ndarray) -> np.ndarray:
        x[1] *= 1.5
        return x

    found = diff(moe, copy_of(moe, tmp_path / "b", **{weight: trained}))
    assert found.experts.keys() == {"same"} and found.same_experts
    assert not found.same and not found.same_rows
    rows = [e.row for e in found.layers[0].experts]
    assert rows == [True, False, True, True, True, True] and found.layers[0].rows == (5, 6)
    expected = 0.5 if len(contents_of(moe).rows[block][0]) == 1 else None
    far = found.layers[0].experts[1].row_distance
    assert far == pytest.approx(expected) if expected else far and 0 < far < 0.5  # with a bias


def test_copies_are_told_from_what_moved(moe: mc.Checkpoint) -> None:
    found = diff(moe, mc.expand(moe, mc.ExpandOptions(factor=2)))
    assert all(x.counts == {"same": 1, "moved": 5, "copied": 6} for x in found.layers)
    back = diff(mc.expand(moe, mc.ExpandOptions(factor=2)), moe)
    assert all(x.counts == {"same": 1, "moved": 5, "removed": 6} for x in back.layers)


def test_an_ffn_that_became_an_expert_is_noted() -> None:
    dense = mc.Checkpoint.open(Path(__file__).parents[2] / "examples" / "models" / "stories260K")
    grown = mc.upcycle(dense, mc.UpcycleOptions(num_experts=2))
    said = "30 of 30 new tensors hold the bytes of tensors that are gone"
    assert said in diff(dense, grown).notes
    assert said.replace("30", "15") in diff(grown, dense).notes
    assert not diff(dense, dense).notes


def test_refitted_experts_are_known_by_their_rows(moe: mc.Checkpoint, tmp_path: Path) -> None:
    """Fewer experts, all of new bytes: who is who is told by the router."""
    sparse = [int(block.rpartition(".")[2]) for block in contents_of(moe).experts]
    small = mc.write(selected(moe, dict.fromkeys(sparse, (5, 2))), tmp_path / "small")
    names = [
        p.name for b in contents_of(small).experts.values() for e in b.values() for p in e.values()
    ]
    refit = copy_of(small, tmp_path / "refit", **dict.fromkeys(names, lambda x: x * np.float32(2)))
    found = diff(moe, refit)
    kept = [[(e.expert, e.was, e.status) for e in x.experts[:2]] for x in found.layers]
    assert kept == [[(0, 5, "changed"), (1, 2, "changed")]] * len(sparse)
    assert found.layers[0].experts[0].distance == pytest.approx(1.0)


@given(st.permutations(range(5)), st.lists(st.integers(0, 4), max_size=6))
def test_who_is_who(order: list[int], copies: list[int]) -> None:
    def identity(content: int) -> Any:
        return (("w", "F32", (1,), str(content)),)

    a = {i: identity(i) for i in range(5)}
    assert match(a, {i: identity(e) for i, e in enumerate(order)}, {}, {}) == dict(enumerate(order))
    assert match(a, {i: identity(e) for i, e in enumerate(copies)}, {}, {}) == dict(
        enumerate(copies)
    )
    new = {i: identity(100 + i) for i in range(5)}
    assert match(a, new, {}, {}) == {i: i for i in range(5)}
    assert (
        match(a, {**new, 5: identity(7)}, {}, {}) == {}
    )  # of other numbers, an index says nothing
    rows = {i: identity(e) for i, e in enumerate(order)}
    assert match(a, new, a, rows) == dict(enumerate(order))
    assert match(a, {**new, 5: identity(7)}, {i: identity(0) for i in a}, rows) == {}  # equal rows


def test_a_plan_is_what_it_writes(make: Make, tmp_path: Path) -> None:
    """Also where values are computed: noise, drawn anew by each."""
    plan = plan_of(make(), method="noise", noise_std=1.0)
    written = mc.write(plan, tmp_path / "out")
    assert HISTORY_NAME in written.files and HISTORY_NAME not in plan.files
    assert diff(plan, written).same
    other = diff(plan, plan_of(make(name="b"), method="noise", noise_std=1.0, seed=1))
    assert other.experts.keys() <= {"same", "changed"} and not other.tensors


def test_shared_bytes_are_hashed_once(moe: mc.Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    sparse = [int(block.rpartition(".")[2]) for block in contents_of(moe).experts]
    diff(moe, selected(moe, dict.fromkeys(sparse, range(6))), progress=lambda *x: told.append(x))
    assert told[-1] == (moe.total_bytes, moe.total_bytes)


def test_config_and_files(make: Make) -> None:
    a = make("mixtral", name="a", rope_scaling={"type": "x", "factor": 2}, files={"t.json": "1"})
    b = make("mixtral", name="b", rope_scaling={"type": "x", "factor": 2.0}, files={"u.json": "1"})
    found = diff(a, b)
    [entry] = found.config
    assert (entry.name, entry.status) == ("rope_scaling.factor", "changed")
    assert found.files == {"t.json": "removed", "u.json": "added"}
    assert found.same_experts and not found.same
    cards = {"README.md": "x", HISTORY_NAME: "[]"}
    assert diff(make(name="c"), make(name="d", files=cards)).same


def test_other_families_and_unknown_ones(make: Make) -> None:
    dense, moe = make(), make("mixtral", name="moe")
    found = diff(dense, moe)
    assert found.experts == {"added": 8}
    assert {t.status for t in found.tensors} == {"removed"} and found.same_tensors > 0
    strange = make("mixtral", name="s", model_type="newcomer")
    assert "newcomer" in diff(moe, strange).notes[0]
    document = json.loads(json.dumps(found.to_json()))
    assert document["experts"]["added"] == 8 and document["same"] is False


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4", "dbrx", "ernie4_5_moe", "zaya"])
def test_every_byte_belongs_to_one_piece(family: str, tmp_path: Path) -> None:
    """Experts one by one, stacked, row after row; routers with leading dimensions and tables."""
    source = lively_checkpoint(family, tmp_path / family)
    found, held = contents_of(source), dict.fromkeys(source.tensors, 0)
    for piece in found.pieces():
        held[piece.name] += source.tensors[piece.name].nbytes // max(piece.parts, 1)
    assert held == {name: info.nbytes for name, info in source.tensors.items()}
    count = len(next(iter(found.experts.values())))
    sparse = [int(re.findall(r"\d+", block)[0]) for block in found.experts]
    turned = diff(source, selected(source, dict.fromkeys(sparse, tuple(range(count))[::-1])))
    was = [e.was for layer in turned.layers for e in layer.experts]
    assert was == list(range(count))[::-1] * len(sparse)
    assert all(layer.rows == (count, count) for layer in turned.layers if layer.rows[1])
    assert {t.name.rpartition(".")[2] for t in turned.tensors} <= {"tid2eid"}
