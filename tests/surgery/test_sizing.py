"""The count of experts that a size allows, held to what is written.

pytest tests/surgery/test_sizing.py

Independent reference: every count is planned, and its bytes are added up.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pruned import lively_checkpoint

import moe_compose as mc
from moe_compose.surgery.merge import merge_unmeasured
from moe_compose.surgery.sizing import bytes_allowed, bytes_of, size_problem


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    return lively_checkpoint("mixtral", tmp_path_factory.mktemp("moe") / "tiny")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    return lively_checkpoint("deepseek_v3", tmp_path_factory.mktemp("moe") / "tiny")


def prune(source: mc.Checkpoint, **options: object) -> mc.Plan:
    return mc.prune(source, None, mc.PruneOptions(criterion="random", **options))  # type: ignore[arg-type]


def experts(plan: mc.Plan) -> int:
    return len(next(iter(plan.decided["kept"].values())))


def sizes(source: mc.Checkpoint, counts: range) -> dict[int, int]:
    return {c: prune(source, keep=c).summary().bytes for c in counts}


def test_the_largest_that_fits(moe: mc.Checkpoint, tmp_path: Path) -> None:
    """One byte less, and an expert less stays."""
    by_count = sizes(moe, range(2, 7))
    assert by_count[6] == bytes_of(moe)
    for count, nbytes in by_count.items():
        assert experts(prune(moe, size=f"{nbytes}B")) == count
        if count > 2:
            assert experts(prune(moe, size=f"{nbytes - 1}")) == count - 1
    written = mc.write(prune(moe, size="0.7"), tmp_path / "out")
    assert bytes_of(written) <= 0.7 * bytes_of(moe) < by_count[experts(prune(moe, size="0.7")) + 1]


def test_groups_of_the_router_stay_whole(grouped: mc.Checkpoint) -> None:
    """6 and 8 of 8 are what it can do with; in between there is nothing."""
    by_count = {c: prune(grouped, keep=c).summary().bytes for c in (6, 8)}
    assert experts(prune(grouped, size=str(by_count[8] - 1))) == 6
    with pytest.raises(mc.OptionError) as caught:
        prune(grouped, size=str(by_count[6] - 1))
    share = by_count[6] / by_count[8]
    assert "6 experts" in caught.value.problems[0] and f"{share:.2f}" in caught.value.problems[0]


def test_what_came_out_is_said(moe: mc.Checkpoint) -> None:
    plan = prune(moe, ratio=0.5)
    gone = 1 - plan.summary().bytes / bytes_of(moe)
    [note] = [n for n in plan.notes if "of the size" in n]
    assert "50.0%" in note and f"{gone:.1%}" in note
    assert not [n for n in prune(moe, ratio=0.0).notes if "of the size" in n]


def test_merging_takes_a_size_too(moe: mc.Checkpoint) -> None:
    how = mc.MergeOptions(size="0.7", align="none")
    plan, pruned = merge_unmeasured(moe, how), prune(moe, size="0.7")
    assert plan.config["num_local_experts"] == experts(pruned)
    assert plan.summary().bytes == pruned.summary().bytes <= 0.7 * bytes_of(moe)
    with pytest.raises(mc.OptionError, match="both given"):
        merge_unmeasured(moe, mc.MergeOptions(size="0.7", keep=4))
    with pytest.raises(mc.OptionError, match="as small as"):
        merge_unmeasured(moe, mc.MergeOptions(size="0.01"))


@pytest.mark.parametrize("size", ["0", "-1", "half", "20 gigs", "nan", "1e400", ""])
def test_what_is_no_size(size: str, moe: mc.Checkpoint) -> None:
    assert size_problem(size)
    with pytest.raises(mc.OptionError, match="size"):
        prune(moe, size=size)


def test_shares_and_bytes() -> None:
    assert [bytes_allowed(s, 1000) for s in ("0.7", "1", "2", "3KB")] == [700, 1000, 2, 3000]


def test_one_of_three(moe: mc.Checkpoint) -> None:
    with pytest.raises(mc.OptionError, match="keep and size given"):
        prune(moe, keep=3, size="0.7")
