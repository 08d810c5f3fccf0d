"""Replacing tensors, or rows of them: bytes, digests, and what does not fit.

pytest tests/surgery/test_replace.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_models import dense_checkpoint
from pruned import lively_checkpoint, raw

import moe_compose as mc
from moe_compose.errors import CheckpointError, PlanError
from moe_compose.surgery.plan import UNTRAINED, Preservation
from moe_compose.surgery.replace import Changed, ChangedWriter, replace_tensors

STACKED = "model.layers.1.mlp.experts.down_proj"
WHOLE = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    return lively_checkpoint("gpt_oss", tmp_path_factory.mktemp("replace") / "tiny")


def changed(source, rows=(1, 2, 4), fill=1.0, folder=None, name=STACKED) -> Changed:
    shape = source.tensors[STACKED].shape[1:]
    writer = ChangedWriter(source.config, folder)
    writer.add({name: torch.full((len(rows), *shape), fill)}, {name: rows})
    writer.add({WHOLE: torch.full(source.tensors[WHOLE].shape, fill)}, {})
    found = writer.finish()
    assert found is not None
    return found


def replaced(source, new: Changed) -> mc.Plan:
    return replace_tensors(source, new, operation="test", preservation=Preservation("none", "test"))


def test_rows_and_wholes(source: mc.Checkpoint) -> None:
    plan = replaced(source, changed(source))
    old, new = source.read(STACKED), plan.read(STACKED)
    assert torch.equal(new[[0, 3, 5]], old[[0, 3, 5]]) and (new[[1, 2, 4]] == 1).all()
    assert len(raw(plan, STACKED)) == len(raw(source, STACKED)), "bytes, nothing is decoded"
    assert (plan.read(WHOLE) == 1).all()
    assert plan.dropped == {f"source:{WHOLE}": "replaced"}
    other = next(n for n in source.tensors if n not in (STACKED, WHOLE))
    assert raw(plan, other) == raw(source, other)
    everything = replaced(source, changed(source, rows=range(6), fill=3.0))
    assert (everything.read(STACKED) == 3).all()


def test_digests_tell_values_apart(source: mc.Checkpoint, tmp_path: Path) -> None:
    first, same = (replaced(source, changed(source, folder=tmp_path / n)) for n in "ab")
    other = replaced(source, changed(source, fill=2.0))
    assert first.digest() == same.digest() != other.digest()
    assert first.decided["content"] == first.record()["decided"]["content"]
    opened = Changed.open(tmp_path / "a")
    assert replaced(source, opened).digest() == first.digest()
    (tmp_path / "a" / "changed.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        Changed.open(tmp_path / "a")


def test_a_resume_refuses_other_values(source: mc.Checkpoint, tmp_path: Path) -> None:
    mc.write(replaced(source, changed(source)), tmp_path / "out")
    with pytest.raises(mc.WriteError):
        mc.write(replaced(source, changed(source, fill=2.0)), tmp_path / "out", resume=True)


def test_copied_is_said_of_the_first_source(source: mc.Checkpoint) -> None:
    pruned = mc.prune(source, None, mc.PruneOptions(keep=4, criterion="random"))
    plan = replaced(pruned, changed(source, rows=(0,)))
    gate = "model.layers.*.mlp.router.weight"
    assert gate not in pruned.copied() and gate not in plan.copied()
    assert set(plan.copied()) == set(pruned.copied()) - {WHOLE}


def test_temporary_tensors_go_with_the_plan(source: mc.Checkpoint) -> None:
    found = changed(source)
    folder = found.checkpoint.path
    assert folder is not None and folder.is_dir()
    del found
    assert not folder.exists()
    assert ChangedWriter(source.config).finish() is None


def test_what_does_not_fit(source: mc.Checkpoint) -> None:
    with pytest.raises(PlanError, match=r"has no model\.layers\.9"):
        replaced(source, changed(source, name="model.layers.9.mlp.experts.down_proj"))
    with pytest.raises(PlanError, match="rows must ascend"):
        replaced(source, changed(source, rows=(4, 1)))
    with pytest.raises(PlanError, match="rows must ascend"):
        replaced(source, changed(source, rows=(1, 6)))
    writer = ChangedWriter(source.config)
    writer.add({WHOLE: torch.ones(3), STACKED: torch.ones(1, 2).bfloat16()}, {})
    wrong = writer.finish()
    assert wrong is not None
    with pytest.raises(PlanError) as caught:
        replaced(source, wrong)
    assert len(caught.value.problems) == 2


def shared_upcycle(folder: Path) -> mc.Plan:
    """Routed experts that add nothing: their down-projections are 0 on purpose."""
    dense_checkpoint("qwen2", folder)
    options = mc.UpcycleOptions(num_experts=4, top_k=2, method="shared", target="qwen2_moe")
    return mc.upcycle(mc.Checkpoint.open(folder), options)


DOWN = "model.layers.{}.mlp.experts.{}.down_proj.weight"


def one_expert(model: mc.Plan | mc.Checkpoint, operation: str, name: str, fill: float) -> mc.Plan:
    writer = ChangedWriter(model.config)
    info = model.tensors[name]
    writer.add({name: torch.full(info.shape, fill, dtype=torch.float32)}, {})
    found = writer.finish()
    assert found is not None
    stated = Preservation("none", "as asked")
    return replace_tensors(model, found, operation=operation, preservation=stated)


def test_constants_survive_plans_over_plans(tmp_path: Path) -> None:
    """What is 0 on purpose stays so for every plan that takes it over, written or not."""
    made = shared_upcycle(tmp_path / "dense")
    pattern = DOWN.format("*", "*")
    assert pattern in made.constants()
    written = mc.write(made, tmp_path / "moe")
    router = "model.layers.0.mlp.gate.weight"
    for model in (made, written):
        over = one_expert(model, "route", router, 0.5)
        assert pattern in over.constants() and pattern in over.record()["constants"]
        kept = mc.remove_expert(over, mc.RemoveOptions(expert=("1",)))
        assert pattern in kept.constants(), "names move, values do not"
        assert pattern in mc.expand(model, mc.ExpandOptions()).constants()
        changed = one_expert(model, "route", DOWN.format(0, 1), 0.5).constants()
        assert pattern not in changed and DOWN.format(0, 1) not in changed
        assert DOWN.format(0, 0) in changed and DOWN.format(1, 1) in changed
    (tmp_path / "moe" / "moe_compose.json").unlink()
    fresh = mc.Checkpoint.open(tmp_path / "moe")
    assert pattern not in one_expert(fresh, "route", router, 0.5).constants(), "nobody vouches"


def test_what_finishes_a_plan_is_stated_of_its_source(tmp_path: Path) -> None:
    made = shared_upcycle(tmp_path / "dense")
    dense = made.sources["dense"]
    router = "model.layers.0.mlp.gate.weight"
    finished = one_expert(made, "route", router, 0.5)
    assert finished.reference is dense and made.reference is dense
    pruned = mc.remove_expert(made, mc.RemoveOptions(expert=("1",)))
    refitted = one_expert(pruned, "refit", router, 0.5)
    assert refitted.reference is made
    assert pruned.preservation.why in refitted.preservation.why
    trained = one_expert(made, "train-router", router, 0.5)
    assert trained.reference is made and trained.preservation.why == "as asked"
    assert UNTRAINED in finished.notes and UNTRAINED not in trained.notes
    embedding = "model.embed_tokens.weight"
    assert embedding in finished.copied() and router.replace("0", "*") not in finished.copied()
