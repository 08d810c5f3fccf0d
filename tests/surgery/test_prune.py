"""Which experts are kept: options, rankings, groups, ties, guards, and the reasons given.

pytest tests/surgery/test_prune.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hand_made import Make, make_checkpoint
from pruned import lively_checkpoint

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.surgery.prune import best, explain
from moe_compose.surgery.prune_options import kept_count

DEEPSEEK = {
    "n_routed_experts": 16, "num_experts_per_tok": 4, "hidden_size": 32, "num_hidden_layers": 4,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(kind: str = "mixtral", name: str = "moe", **rest: object) -> mc.Checkpoint:
        return make_checkpoint(tmp_path / name, kind, **rest)  # type: ignore[arg-type]

    return make


def prune(source: mc.Checkpoint, stats: object = None, **options: object):
    return mc.prune(source, stats, mc.PruneOptions(**{"criterion": "random", **options}))


def ranking(*worths: float, **rest: object) -> mc.Ranking:
    return mc.Ranking(criterion="reap", worths={0: worths}, **rest)


def test_the_best_are_kept_in_their_old_order_and_ties_go_to_the_lower_id() -> None:
    assert best(ranking(1.0, 3.0, 2.0, 3.0), 0, 2) == (1, 3)
    assert best(ranking(0.0, 0.0, 0.0, 0.0), 0, 2) == (0, 1)
    assert best(ranking(0.0, 5.0, 0.0, 0.0), 0, 3) == (0, 1, 2)
    assert ranking(0.0, -0.0, 1.0).order(0) == (2, 0, 1)


def test_as_many_in_each_group() -> None:
    worths = ranking(9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 0.0)
    assert best(worths, 0, 4, groups=2) == (0, 1, 5, 6)
    assert best(worths, 0, 4) == (0, 1, 2, 3)
    why = explain(worths, {0: (0, 1, 5, 6)}, groups=2)["0"]
    assert why[0] == {
        "expert": 2, "rank": 3, "worth": 7.0, "why": "in group 0: rank 3 of 4; 2 are kept",
    }  # fmt: skip


def test_guarded_experts_stay_and_it_is_said_whose_place_they_took() -> None:
    guarded = ranking(4.0, 3.0, 2.0, 1.0, guarded={0: (3,)})
    assert best(guarded, 0, 2) == (0, 3)
    rows = explain(guarded, {0: (0, 3)})["0"]
    assert [r["expert"] for r in rows] == [1, 2]
    assert rows[0]["why"] == "rank 2 of 4; 2 are kept; guarded experts (3) took the place"
    assert rows[1]["why"] == "rank 3 of 4; 2 are kept"


def test_more_guarded_than_kept(make: Make) -> None:
    worths = dict.fromkeys((0, 1), (4.0, 3.0, 2.0, 1.0))
    guarded = mc.Ranking(criterion="reap", worths=worths, guarded={1: (0, 2, 3)})
    with pytest.raises(mc.OptionError, match="layer 1: 3 guarded experts"):
        prune(make(), guarded, keep=2, criterion="reap")


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.0, 16), (0.25, 12), (0.3, 12), (0.5, 8), (0.51, 8), (0.76, 4)]
)
def test_ratio_is_what_is_removed_at_most(ratio: float, kept: int) -> None:
    form = all_architectures()["deepseek_v3"]
    options = mc.PruneOptions(ratio=ratio)
    assert kept_count(options, form.moe(DEEPSEEK)) == kept
    ungrouped = form.moe({**DEEPSEEK, "n_group": 1, "topk_group": 1})
    assert kept_count(options, ungrouped) == 16 - int(16 * ratio)


def test_all_faults_at_once(make: Make) -> None:
    with pytest.raises(mc.OptionError) as caught:
        prune(
            make(), ratio=2.0, keep=3, criterion="best", domain_weight=("code",), mtp="no",
            super_experts="some", ranking=Path("x.json"),
        )  # fmt: skip
    said = "\n".join(caught.value.problems)
    for text in (
        "one of keep, ratio and size", "criterion (best)", "domain_weight (code)", "mtp (no)",
        "super_experts (some)", "a ranking has no meaning", "ratio (2.0)",
    ):  # fmt: skip
        assert text in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "none given"),
        ({"keep": 1}, "the router picks top_k = 2"),
        ({"keep": 5}, r"keep \(5\) must be between 1 and the number of experts \(4\)"),
        ({"keep": 2, "domain_weight": ("a=1",)}, "it sees no text"),
        ({"keep": 2, "criterion": "reap"}, "needs statistics"),
        ({"keep": 2, "criterion": "given"}, "needs a ranking"),
        ({"keep": 2, "criterion": "aimer"}, "rank_by_weights"),
    ],
)
def test_options_that_cannot_be_meant(options: dict, why: str, make: Make) -> None:
    with pytest.raises(mc.OptionError, match=why):
        prune(make(), **options)


def test_groups_decide_what_can_be_kept(tmp_path: Path) -> None:
    source = lively_checkpoint("deepseek_v3", tmp_path / "tiny")
    for keep, why in ((5, "multiple of the router's groups"), (4, "hold fewer than top_k")):
        with pytest.raises(mc.OptionError, match=why):
            prune(source, keep=keep)
    plan = prune(source, keep=6, seed=1)
    for ids in plan.decided["kept"].values():
        assert sum(e < 4 for e in ids) == 3


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({0: [0, 1, 2, 3]}, "lacks layers"),
        ({0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 7: [0, 1, 2, 3]}, r"layers \[7\]"),
        ({0: [0, 1, 2], 1: [0, 1, 2, 3]}, "layer 0: 3 experts are ranked, there are 4"),
        ({0: [0, 1, 2, 2], 1: [0, 1, 2, 3]}, "named once"),
        ({"x": [0, 1], 1: [0, 1, 2, 3]}, "'x' is no layer"),
        ({}, "it is empty"),
    ],
)
def test_rankings_that_cannot_be_meant(given: dict, why: str, make: Make) -> None:
    with pytest.raises(mc.OptionError, match=why):
        prune(make(), given, keep=2, criterion="given")


def test_not_a_number_is_no_worth(make: Make) -> None:
    worths = {0: (1.0, float("nan"), 0.0, 0.0), 1: (1.0, 2.0, 0.0, 0.0)}
    with pytest.raises(mc.OptionError, match=r"worths of experts \[1\] are not finite"):
        prune(make(), mc.Ranking(criterion="reap", worths=worths), keep=2, criterion="reap")


def test_a_ranking_goes_out_and_comes_in(make: Make, tmp_path: Path) -> None:
    source = make()
    first = prune(source, keep=3, seed=7)
    written = mc.write(first, tmp_path / "out")
    report = json.loads((tmp_path / "out/pruning.json").read_text())
    assert report["kept"] == first.decided["kept"]
    assert {len(rows) for rows in report["removed"].values()} == {1}
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(report["ranking"]))
    for file in (tmp_path / "out/pruning.json", plain):
        again = prune(source, keep=3, criterion="given", ranking=file)
        assert again.digest() == first.digest()
        assert again.options["ranking"] == file.name
    twice = prune(written, keep=2)
    assert "pruning.json" in written.files
    assert "pruning.json" not in twice.files
    mc.write(twice, tmp_path / "twice")
    now = json.loads((tmp_path / "twice/pruning.json").read_text())
    assert {len(kept) for kept in now["kept"].values()} == {2}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(mc.OptionError, match="holds no ranking"):
        prune(source, keep=3, criterion="given", ranking=tmp_path / "list.json")


def test_equal_options_equal_plans_and_the_record(make: Make, tmp_path: Path) -> None:
    source = make()
    plan = prune(source, keep=2)
    assert plan.digest() == prune(source, ratio=0.5).digest()
    assert plan.digest() != prune(source, keep=2, seed=1).digest()
    assert plan.preservation.kind == "none"
    assert "masked out of its routers" in plan.preservation.why
    written = mc.write(plan, tmp_path / "out")
    record = json.loads((written.path / "moe_compose.json").read_text())[-1]
    assert record["operation"] == "prune"
    assert record["decided"]["kept"] == plan.decided["kept"]
    assert record["decided"]["of"] == {"seed": 0}
    card = (written.path / "README.md").read_text()
    assert "moe-compose prune moe OUTPUT" in card
    assert "--criterion random" in card


def test_counts_that_are_slower_or_refused_are_named(make: Make, tmp_path: Path) -> None:
    assert not any("experts:" in note for note in prune(make(), keep=2).notes)
    assert any("3 experts: runs everywhere" in n for n in prune(make(name="b"), keep=3).notes)
    v4 = lively_checkpoint("deepseek_v4", tmp_path / "v4")
    notes = prune(v4, keep=6).notes
    assert any("6 experts: the family's own kernels" in note for note in notes)
    assert any("1 layers route by token id" in note for note in notes)


def test_a_family_whose_config_would_mean_something_else(tmp_path: Path) -> None:
    """One expert in Jamba's config makes all layers dense."""
    source = lively_checkpoint("jamba", tmp_path / "tiny", num_experts_per_tok=1)
    with pytest.raises(mc.UnsupportedError, match="other layers to be sparse"):
        prune(source, keep=1)


def test_a_plan_is_pruned_before_it_is_written(make: Make) -> None:
    first = prune(make(), keep=3)
    second = prune(first, keep=2)  # type: ignore[arg-type]
    assert second.config["num_local_experts"] == 2
    assert [r["operation"] for r in (first.record(), second.record())] == ["prune", "prune"]
    assert replace(second, options={}).digest() == second.digest()
