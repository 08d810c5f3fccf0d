"""Writing with record and card, and keeping what validation measured.

Run: pytest tests/reporting/test_publish.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hand_made import Make, plan_of

import moe_compose as mc
from moe_compose.reporting.catalogue import families, methods
from moe_compose.reporting.documents import encode, history_of, plain
from moe_compose.surgery.compose_options import ROUTERS, SHARED
from moe_compose.surgery.merge_options import MergeMethod
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.prune_options import Criterion
from moe_compose.surgery.transforms import Read
from moe_compose.surgery.upcycle_options import METHODS
from moe_compose.validation.report import Agreement, Check, Receipt, ValidationReport

PASSES = ValidationReport(checkpoint="out", checks=(Check("tensors", "pass", "all there"),))
FAILS = ValidationReport(checkpoint="out", checks=(Check("tensors", "fail", "one is missing"),))
MEASURED = replace(
    PASSES,
    receipt=Receipt(
        "dense",
        "text",
        10,
        (Agreement("float32", 0.0, 0.0, 0.0, float("nan"), 1.0, 1.0, 1.0, 2.0),),
        "exact",
        True,
        "the same",
    ),
)


def records(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "moe_compose.json").read_text())
    return found


def test_a_plan_is_written_with_its_record_and_card(make: Make, tmp_path: Path) -> None:
    plan = plan_of(make(files={"README.md": "# old", "tokenizer.json": "{}"}))
    written = mc.write(plan, tmp_path / "out")
    assert written.path == tmp_path / "out"
    [record] = records(tmp_path / "out")
    assert record["operation"] == "upcycle"
    assert record["plan_digest"] == plan.digest()
    assert record["preservation"]["kind"] == "exact"
    [source] = record["sources"]
    assert (source["label"], source["digest"]) == ("dense", plan.sources["dense"].digest())
    card = (tmp_path / "out" / "README.md").read_text()
    assert plan.digest() in card and card.rstrip().endswith("# old")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_the_history_of_the_source_goes_on(make: Make, tmp_path: Path) -> None:
    earlier = {"operation": "merge", "plan_digest": "ab", "sources": [{"label": "x"}], "more": 1}
    plan = plan_of(make(files={"moe_compose.json": json.dumps([earlier])}))
    assert "moe_compose.json" in plan.files
    mc.write(plan, tmp_path / "out")
    before, own = records(tmp_path / "out")
    assert before == earlier and own["operation"] == "upcycle"
    assert "`merge` of x" in (tmp_path / "out" / "README.md").read_text()
    assert plan.digest() == own["plan_digest"]


def test_a_plan_of_a_plan_keeps_history_and_card(make: Make) -> None:
    inner = plan_of(make(files={"README.md": "# old"}))
    outputs = tuple(OutputTensor(t.name, Read("moe", t)) for t in inner.tensors.values())
    outer = replace(inner, operation="prune", outputs=outputs, sources={"moe": inner}, card=None)
    assert [r["operation"] for r in history_of(outer)] == ["upcycle", "prune"]
    card = mc.model_card(outer, None)
    assert card.rstrip().endswith("# old")
    assert "- `upcycle` of dense" in card


def test_a_damaged_history_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path
) -> None:
    plan = plan_of(make(files={"moe_compose.json": "[1]"}))
    with pytest.raises(mc.CheckpointError, match="list of records"):
        mc.write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_only_sharded_anew(make: Make, tmp_path: Path) -> None:
    source = make(files={"README.md": "# mine", "moe_compose.json": "[]"})
    written = mc.write(source, tmp_path / "out", shard_size=10_000)
    assert len(written.weight_files) > 1
    assert (tmp_path / "out" / "README.md").read_text() == "# mine"
    assert records(tmp_path / "out") == []


def test_what_was_measured_is_kept(make: Make, tmp_path: Path) -> None:
    plan = plan_of(make())
    written = mc.write(plan, tmp_path / "out")
    path = mc.record_validation(written, plan, MEASURED)
    assert path == tmp_path / "out" / "validation.json"
    kept = json.loads(path.read_text())
    assert kept["ok"] is True
    assert kept["receipt"]["agreements"][0]["kl"] is None  # JSON has no NaN
    card = (tmp_path / "out" / "README.md").read_text()
    [entry] = records(tmp_path / "out")[0]["sources"]
    assert entry["files"]["model.safetensors"] in card
    assert "**Met**: the same" in card


def test_a_later_validation_renews_only_its_own_part(make: Make, tmp_path: Path) -> None:
    plan = plan_of(make())
    written = mc.write(plan, tmp_path / "out")
    path = tmp_path / "out" / "README.md"
    path.write_text(path.read_text() + "\nadded by hand\n")
    mc.record_validation(written, None, MEASURED)
    card = path.read_text()
    assert "**Met**" in card and "added by hand" in card and plan.digest() in card


def test_a_card_of_somebody_else_is_not_touched(make: Make) -> None:
    source = make(files={"README.md": "# mine"})
    mc.record_validation(source, None, MEASURED)
    assert (source.path / "README.md").read_text() == "# mine"
    assert (source.path / "validation.json").is_file()


def test_a_receipt_is_not_replaced_by_less(make: Make) -> None:
    source = make()
    mc.record_validation(source, None, MEASURED)
    assert mc.record_validation(source, None, PASSES) is None
    assert json.loads((source.path / "validation.json").read_text())["receipt"]
    assert mc.record_validation(source, None, FAILS) is not None  # but bad news is kept
    assert json.loads((source.path / "validation.json").read_text())["ok"] is False


def test_plain_values() -> None:
    assert plain({"a": (1, float("inf")), 2: Path("x")}) == {"a": [1, None], "2": "x"}
    assert encode({"a": "é"}) == '{\n  "a": "é"\n}\n'.encode()


def test_every_method_and_family_is_listed() -> None:
    rows = methods()
    assert [(m.method, m.preservation) for m in rows if m.operation == "upcycle"] == [
        (name, info.preserves) for name, info in METHODS.items()
    ]
    assert [m.method for m in rows if m.operation == "prune"] == list(get_args(Criterion))
    assert [m.method for m in rows if m.operation == "merge"] == list(get_args(MergeMethod))
    assert [m.method for m in rows if m.operation == "compose --shared"] == list(SHARED)
    assert [m.method for m in rows if m.operation == "compose --router"] == list(ROUTERS)
    needs = {m.method: m.needs for m in rows if m.operation == "prune"}
    assert [n for n in needs if "loo" in needs[n]] == ["loo-mse", "naee-greedy"]
    assert all(m.paper and m.summary for m in rows)
    by_name: Mapping[str, Any] = {row.family: row for row in families()}
    assert by_name["llama"].kind == "dense" and "mixtral" in by_name["llama"].grows_into
    assert "llama" in by_name["mixtral"].grown_from
    assert by_name["qwen3_moe"].decided_by == ("norm_topk_prob",)
    assert by_name["granitemoe"].experts == "stacked, fused"


def test_public_names_are_all_there() -> None:
    assert [*list(mc._HOME), "__version__"] == mc.__all__
    for name in mc.__all__:
        assert getattr(mc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mc.nothing
