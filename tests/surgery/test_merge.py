"""What merging refuses, records and leaves alone; means, rows and tables by hand.

pytest tests/surgery/test_merge.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merged import measured, rewired
from mutants import mutant
from pruned import error, lively_checkpoint, masked_run, raw, run
from streamed import make_batches

import moe_compose as mc
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.errors import PlanError
from moe_compose.surgery.arithmetic import Cast, cast
from moe_compose.surgery.averages import Mean, Mix
from moe_compose.surgery.evaluate import check_on_meta
from moe_compose.surgery.indices import Fused, Order
from moe_compose.surgery.tables import Regroup
from moe_compose.surgery.transforms import Read

BATCHES = make_batches()
Measured = Callable[[str], tuple[mc.Checkpoint, mc.ExpertStats]]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    made: dict[str, tuple[mc.Checkpoint, mc.ExpertStats]] = {}

    def moe(family: str) -> tuple[mc.Checkpoint, mc.ExpertStats]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = lively_checkpoint(family, folder / "tiny")
            made[family] = source, measured(source, folder / "stats")
        return made[family]

    return moe


def read(*shape: int, dtype: str = "F32") -> Read:
    return Read("source", TensorInfo.of("x", dtype, shape))


def grouping(source: mc.Checkpoint, groups: list[list[int]], **rest: object) -> mc.Grouping:
    """The same groups in every layer, unaligned."""
    made = mc.ExpertGroups.of(groups, [1.0] * 64)
    layers = dict.fromkeys(range(source.config["num_hidden_layers"]), made)
    return mc.Grouping(**{"method": "hc-smoe", "layers": layers, **rest})  # type: ignore[arg-type]


def options(**rest: object) -> mc.MergeOptions:
    return mc.MergeOptions(**{"keep": 3, "method": "hc-smoe", "align": "none", **rest})  # type: ignore[arg-type]


def test_a_mean_is_rounded_once_and_equal_values_are_kept() -> None:
    x = torch.randn(3000, 700, generator=torch.Generator().manual_seed(0))
    weights = (0.1, 0.2, 0.3, 0.4)
    assert torch.equal(Mean((read(3000, 700),) * 4, weights).apply(x, x, x, x), x)
    y = torch.randn(3000, 700, generator=torch.Generator().manual_seed(1))
    found = Mean((read(3000, 700),) * 2, (0.25, 0.75)).apply(x, y.bfloat16())
    assert torch.equal(found, (x.double() / 4 + y.bfloat16().double() * 0.75).float())
    check_on_meta(Mean((read(4, 5), read(4, 5, dtype="BF16")), (0.5, 0.5)))


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.0,), (float("nan"), 1.0)])
def test_weights_that_do_not_sum_to_1(weights: tuple, moe: Measured) -> None:
    with pytest.raises(PlanError, match="must sum to 1"):
        check_on_meta(Mean((read(4, 5),) * 2, weights))
    with pytest.raises(PlanError, match="must sum to 1"):
        check_on_meta(Mix(read(4, 5), ((0, 1),), (weights,)))
    source, _ = moe("mixtral")
    wrong = mc.ExpertGroups(((0, 1), (2, 3), (4, 5)), (weights, (0.5, 0.5), (0.5, 0.5)))
    bad = mc.Grouping(method="hc-smoe", layers=dict.fromkeys(range(3), wrong))
    with pytest.raises(mc.OptionError, match=r"sum to 1|must have a weight"):
        mc.merge(source, bad, options())


def test_means_of_other_things_than_numbers_are_refused() -> None:
    for wrong in (read(4, 5, dtype="F8_E4M3"), read(4, 5, dtype="U8"), read(5, 4)):
        with pytest.raises(PlanError, match=r"no mean of dtype|different shapes"):
            check_on_meta(Mean((read(4, 5), wrong), (0.5, 0.5)))


def test_rows_and_entries_are_mixed_along_any_dimension() -> None:
    groups, weights = ((1,), (2, 0)), ((1.0,), (0.75, 0.25))
    x = torch.tensor([[1.0, 10.0, 100.0]])
    assert Mix(read(1, 3), groups, weights, 1).apply(x).tolist() == [[10.0, 75.25]]
    assert Mix(read(3, 1), groups, weights).apply(x.T).tolist() == [[10.0], [75.25]]
    check_on_meta(Mix(read(1, 3, dtype="BF16"), groups, weights, 1))


def test_orders_of_neurons() -> None:
    order = Order.of([2, 0, 1])
    assert order.moved == 3
    assert len(Order.of(range(70_000)).packed) == 280_000
    assert Fused(order, pairs=False).indices().tolist() == [2, 0, 1, 5, 3, 4]
    assert Fused(order, pairs=True).indices().tolist() == [4, 5, 0, 1, 2, 3]
    assert not Order.of([0, 0, 1]).is_permutation


def test_tables_name_groups_and_no_group_twice() -> None:
    """Experts 0 and 1 became group 0, 2 and 3 group 1, 4 stayed alone."""
    table = torch.tensor([[0, 2, 4], [0, 1, 4], [3, 2, 1], [4, 0, 1]])
    found = Regroup(read(4, 3, dtype="I64"), (0, 0, 1, 1, 2)).apply(table)
    assert found.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_hash_routed_layers_are_merged(moe: Measured, tmp_path: Path) -> None:
    source, stats = moe("deepseek_v4")
    plan = mc.merge(source, stats, mc.MergeOptions(keep=5, method="hc-smoe"))
    name = next(n for n in source.tensors if n.endswith("tid2eid"))
    groups = plan.decided["groups"]["0"]
    homes = {e: j for j, group in enumerate(groups) for e in group}
    table, before = plan.read(name).tolist(), source.read(name).tolist()
    assert all(len(set(row)) == 3 for row in table)
    assert all(homes[old[0]] == new[0] for old, new in zip(before, table, strict=True))
    assert any("route by token id" in note for note in plan.notes)
    run(mc.write(plan, tmp_path / "out"), BATCHES)


def test_experts_that_stay_alone_keep_their_bytes(moe: Measured, tmp_path: Path) -> None:
    source, _ = moe("mixtral")
    groups = [[0, 3], [1], [2], [4], [5]]
    plan = mc.merge(source, grouping(source, groups), options(keep=5))
    written = mc.write(plan, tmp_path / "out")
    at = "model.layers.1.block_sparse_moe.experts"
    for new, old in ((1, 1), (2, 2), (3, 4), (4, 5)):
        for w in ("w1", "w2", "w3"):
            assert raw(written, f"{at}.{new}.{w}.weight") == raw(source, f"{at}.{old}.{w}.weight")
    mean = (source.read(f"{at}.0.w1.weight") + source.read(f"{at}.3.w1.weight")) / 2
    torch.testing.assert_close(written.read(f"{at}.0.w1.weight"), mean)
    for name in source.tensors:
        if "block_sparse_moe" not in name:
            assert raw(written, name) == raw(source, name)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "dbrx", "gpt_oss"])
def test_nothing_merged_is_nothing_changed(family: str, moe: Measured, tmp_path: Path) -> None:
    source, stats = moe(family)
    plan = mc.merge(source, stats, mc.MergeOptions(keep=6, method="hc-smoe"))
    assert plan.preservation.kind == "exact"
    written = mc.write(plan, tmp_path / "out")
    assert dict(written.config) == dict(source.config)
    assert all(raw(written, n) == raw(source, n) for n in source.tensors)


def test_rows_of_the_mean(moe: Measured, tmp_path: Path) -> None:
    """Copies whose rows are the same too: the mean row is the representative's."""
    tiny, _ = moe("mixtral")
    pairs, _ = rewired(tiny, tmp_path / "pairs", {1: 0, 3: 2, 5: 4})

    def same_rows(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name][1::2] = tensors[name][::2]

    source = mutant(pairs, tmp_path / "source", tensors=same_rows)
    stats = measured(source, tmp_path / "stats")
    expected = masked_run(source, dict.fromkeys(range(3), (0, 2, 4)), BATCHES)
    for router in ("representative", "mean"):
        plan = mc.merge(source, stats, options(router=router, align="method"))
        assert error(run(plan, BATCHES), expected) <= 1e-6
    means = [mc.merge(pairs, stats, options(router=r)) for r in ("representative", "mean")]  # type: ignore[arg-type]
    name = "model.layers.0.block_sparse_moe.gate.weight"
    rows, weights = pairs.read(name).double(), means[1].decided["weights"]["0"]
    for j, (a, b) in enumerate(means[1].decided["groups"]["0"]):
        mean = rows[a] * weights[j][0] + rows[b] * weights[j][1]
        torch.testing.assert_close(means[1].read(name)[j].double(), mean)
    assert not torch.equal(means[0].read(name), means[1].read(name))


@pytest.mark.parametrize("method", ["hc-smoe", "m-smoe", "ream"])
def test_record_and_report(method: str, moe: Measured, tmp_path: Path) -> None:
    source, stats = moe("mixtral")
    plan = mc.merge(source, stats, mc.MergeOptions(keep=4, method=method))  # type: ignore[arg-type]
    again = mc.merge(source, stats, mc.MergeOptions(keep=4, method=method))  # type: ignore[arg-type]
    assert plan.digest() == again.digest()
    written = mc.write(plan, tmp_path / "out")
    record = json.loads((written.path / "moe_compose.json").read_text())[-1]
    assert record["operation"] == "merge"
    assert record["decided"]["aligned"] == ("activations" if method == "ream" else "weights")
    for layer, groups in record["decided"]["groups"].items():
        assert sorted(e for g in groups for e in g) == list(range(6))
        for weights in record["decided"]["weights"][layer]:
            assert sum(weights) == pytest.approx(1)
    report = json.loads((written.path / "merging.json").read_text())
    assert {len(groups) for groups in report["layers"].values()} == {4}
    card = (written.path / "README.md").read_text()
    assert f"--method {method}" in card
    assert {"hc-smoe": "2410.08589", "m-smoe": "2310.01334", "ream": "2604.04356"}[method] in card
    assert plan.preservation.kind == "none"


def test_a_plan_is_merged_and_a_merged_one_pruned(moe: Measured, tmp_path: Path) -> None:
    source, _ = moe("mixtral")
    first = mc.prune(source, None, mc.PruneOptions(keep=5, criterion="random"))
    merged = mc.merge(first, grouping(source, [[0, 1], [2, 4], [3]]), options())
    assert merged.config["num_local_experts"] == 3
    last = mc.prune(merged, None, mc.PruneOptions(keep=2, criterion="random"))
    written = mc.write(last, tmp_path / "out")
    assert error(run(written, BATCHES), run(last, BATCHES)) == 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"keep": None}, "neither given"),
        ({"keep": 1}, "the router picks top_k = 2"),
        ({"keep": 7}, r"keep \(7\) must be between 1"),
        ({"method": "mean"}, r"method \(mean\) must be one of"),
        ({"method": "ream", "router": "mean"}, "router = mean is hc-smoe's"),
        ({"align": "some"}, r"align \(some\) must be"),
        ({"mtp": "merge"}, r"mtp \(merge\) must be"),
        ({"group_size": 1}, r"group_size \(1\)"),
        ({"keep": 2, "method": "ream", "group_size": 2}, "cannot hold 6 experts"),
    ],
)
def test_options_that_cannot_be_meant(given: dict, why: str, moe: Measured) -> None:
    source, stats = moe("mixtral")
    with pytest.raises(mc.OptionError, match=why):
        mc.merge(source, stats, options(**given))


def test_groups_of_the_router_are_not_mixed(moe: Measured) -> None:
    source, stats = moe("deepseek_v3")
    for keep, why in ((5, "multiple of the router's groups"), (4, "hold fewer than top_k")):
        with pytest.raises(mc.OptionError, match=why):
            mc.merge(source, stats, options(keep=keep))
    mixed = mc.ExpertGroups.of([[0, 4], [1, 2], [3], [5], [6], [7]], [1.0] * 8)
    with pytest.raises(mc.OptionError, match="of different groups of the router"):
        mc.merge(source, mc.Grouping(method="hc-smoe", layers={2: mixed}), options(keep=6))


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([[0, 1], [2, 3], [4]], "in one group each"),
        ([[0, 1], [2, 3], [4, 5, 0]], "in one group each"),
        ([[0, 1], [2, 3, 4, 5]], "2 groups, keep says 3"),
    ],
)
def test_groupings_of_something_else(groups: list, why: str, moe: Measured) -> None:
    source, _ = moe("mixtral")
    with pytest.raises(mc.OptionError, match=why):
        mc.merge(source, grouping(source, groups), options())
    fine = grouping(source, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(mc.OptionError, match="are grouped"):
        mc.merge(source, replace(fine, layers={0: fine.layers[0]}), options())
    with pytest.raises(mc.OptionError, match="aligned by none"):
        mc.merge(source, fine, options(align="weights"))
    broken = replace(fine, orders={0: {1: Order.of([0] * 40)}})
    with pytest.raises(mc.OptionError, match="no permutations"):
        mc.merge(source, broken, options())


def test_quantised_experts_have_no_mean(moe: Measured, tmp_path: Path) -> None:
    """But they may stay as they are."""
    source, _ = moe("mixtral")

    def stated(config: dict) -> None:
        config["quantization_config"] = {"quant_method": "fp8"}

    def packed(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name.replace("weight", "weight_scale_inv")] = torch.ones(1, 1)

    quantised = mutant(source, tmp_path / "fp8", tensors=packed, config=stated)
    with pytest.raises(mc.UnsupportedError, match=r"is quantised, such as .*F8_E4M3"):
        mc.merge(quantised, grouping(source, [[0, 1], [2, 3], [4, 5]]), options())
    alone = mc.merge(quantised, grouping(source, [[e] for e in range(6)]), options(keep=6))
    assert alone.preservation.kind == "exact"
    scaled = mutant(source, tmp_path / "scaled", config=stated)
    with pytest.raises(mc.UnsupportedError, match="is quantised, and"):
        mc.merge(scaled, grouping(source, [[0, 1], [2, 3], [4, 5]]), options())


def test_multi_token_prediction(moe: Measured, tmp_path: Path) -> None:
    """Its experts are those of the last layer's representatives, unmerged; or it goes; or not."""
    tiny, _ = moe("deepseek_v3")

    def with_mtp(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = torch.rand_like(tensors[name])

    def counted(config: dict) -> None:
        config["num_nextn_predict_layers"] = 1

    source = mutant(tiny, tmp_path / "mtp", tensors=with_mtp, config=counted)
    groups = mc.ExpertGroups.of([[1, 0], [2], [3], [5, 4], [6], [7]], [1.0] * 8)
    given = mc.Grouping(method="hc-smoe", layers={2: groups})
    plan = mc.merge(source, given, options(keep=6))
    assert plan.decided["kept_mtp"] == {"model.layers.3": [1, 2, 3, 5, 6, 7]}
    at = "model.layers.3.mlp.experts"
    assert torch.equal(plan.read(f"{at}.0.up_proj.weight"), source.read(f"{at}.1.up_proj.weight"))
    assert any("unmerged" in note for note in plan.notes)
    gone = mc.merge(source, given, options(keep=6, mtp="drop"))
    assert not any(".layers.3." in name for name in gone.tensors)
    with pytest.raises(mc.UnsupportedError, match="cannot keep another number"):
        mc.merge(source, given, options(keep=6, mtp="keep"))


def test_copies_in_bf16_keep_their_bytes() -> None:
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean = cast(Mean((read(64, 40, dtype="BF16"),) * 3, (1 / 3, 1 / 2, 1 / 6)), "BF16")
    assert isinstance(mean, Cast)
    assert torch.equal(mean.apply(mean.x.apply(x, x, x)), x)
