"""Every MoE family with experts that are copies in pairs, their neurons shuffled: merging the pairs
is the model with one of each masked, and nothing else.

    pytest tests/surgery/test_merge_families.py

Controls: neurons left as they are, router rows that stay behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from logits import load
from merged import measured, rewired
from mutants import mutant
from pruned import error, lively_checkpoint, masked_run, run
from streamed import make_batches
from tiny_models import TINY

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.calibration.alignment import align

ALL = [n for n, form in all_architectures().items() if form.is_moe and n in TINY]
FAMILIES = [n for n in ALL if not all_architectures()[n].read_only]

#: One of each layout and of each kind of router tensor; the rest is slow together.
KINDS = (
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "dbrx"),
    *("nemotron_h", "longcat_flash", "ernie4_5_moe", "gemma4_text", "aria_text", "deepseek_v4"),
)

#: Layers that route by a table have no masked original: a table says where a token goes.
CHANGES = {"deepseek_v4": {"mlp_layer_types": ["moe"] * 3}}

#: Families whose experts cannot be run one by one to compare them: these tests group by hand.
UNMEASURED = {"llama4_text"}

BATCHES = make_batches()

#: A family → checkpoint, statistics, and the shuffles that made every odd expert.
Pairs = Callable[[str], tuple[mc.Checkpoint, mc.ExpertStats | None, dict]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    made: dict[str, tuple] = {}

    def pairs(family: str) -> tuple:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny = lively_checkpoint(family, folder / "tiny", **CHANGES.get(family, {}))
            moe = all_architectures()[family].moe(tiny.config)
            odd = {e: e - 1 for e in range(1, moe.num_experts, 2)}
            source, orders = rewired(tiny, folder / "pairs", odd)
            stats = None if family in UNMEASURED else measured(source, folder / "stats")
            made[family] = source, stats, orders
        return made[family]

    return pairs


def options_of(source: mc.Checkpoint, **rest: object) -> mc.MergeOptions:
    """Half of the experts; six of eight where they are in groups."""
    moe = all_architectures()[source.config["model_type"]].moe(source.config)
    keep = moe.num_experts - 2 if moe.routing.groups > 1 else moe.num_experts // 2
    return mc.MergeOptions(**{"keep": keep, "method": "hc-smoe", **rest})  # type: ignore[arg-type]


def loaded(folder: Path) -> list[torch.Tensor]:
    """Logits as transformers computes them from a folder; no key missing, none unexpected."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = load(folder)
        return [
            model(input_ids=b.ids, attention_mask=b.mask, use_cache=False).logits for b in BATCHES
        ]


def marked(names: list[str]) -> list[object]:
    return [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_pairs_become_one(family: str, pairs: Pairs, tmp_path: Path) -> None:
    source, stats, orders = pairs(family)
    options = options_of(source)
    grouping = grouping_of(source, stats, options)
    for layer, groups in grouping.layers.items():
        for members in groups.members:
            assert len(members) == 1 or sorted(e // 2 for e in members) == [members[0] // 2] * 2
        for e, order in grouping.orders[layer].items():
            assert order.indices().tolist() == found_again(orders[layer], e)
    plan = mc.merge(source, grouping, options)
    assert plan.preservation.kind == "none"
    kept = {layer: groups.representatives for layer, groups in grouping.layers.items()}
    expected = masked_run(source, kept, BATCHES)
    assert error(run(plan, BATCHES), expected) <= 1e-6
    written = mc.write(plan, tmp_path / "out")
    assert error(loaded(written.path), expected) <= 1e-6
    apart = replace(grouping, orders={}, aligned="")
    apart = mc.merge(source, apart, options_of(source, align="none"))
    assert error(run(apart, BATCHES), expected) > 1e-3


def grouping_of(
    source: mc.Checkpoint, stats: mc.ExpertStats | None, options: mc.MergeOptions
) -> mc.Grouping:
    """Pairs, half of each: what was hardly chosen is not left out of the mean."""
    if stats is not None:
        found = mc.group_and_align(source, stats, options)
        even = {i: mc.ExpertGroups.of(g.members, [1.0] * 64) for i, g in found.layers.items()}
        return replace(found, layers=even)
    moe = all_architectures()[source.config["model_type"]].moe(source.config)
    pairs = [[e, e + 1] for e in range(0, moe.num_experts, 2)]
    groups = mc.ExpertGroups.of(pairs, [1.0] * 64)
    by_hand = mc.Grouping(method="hc-smoe", layers=dict.fromkeys(moe.sparse_layers, groups))
    return align(source, by_hand, "weights")


def found_again(shuffles: dict[int, list[int]], expert: int) -> list[int]:
    """The order that gives an expert the neurons of the other one of its pair."""
    if expert % 2 == 0:
        return shuffles[expert + 1]
    return torch.tensor(shuffles[expert]).argsort().tolist()


@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h"]
)
def test_found_again_by_activations(family: str, pairs: Pairs) -> None:
    """All neurons, from hidden activations in fp16 and components of weights."""
    source, stats, orders = pairs(family)
    assert stats is not None
    grouping = mc.group_and_align(source, stats, options_of(source, align="activations"))
    assert grouping.aligned == "activations"
    assert not any("no hidden activations" in note for note in grouping.notes)
    for layer, found in grouping.orders.items():
        assert found
        for e, order in found.items():
            assert order.indices().tolist() == found_again(orders[layer], e)


def test_without_activations_weights_decide(pairs: Pairs) -> None:
    """No layout describes these experts."""
    source, stats, orders = pairs("dbrx")
    assert stats is not None
    grouping = mc.group_and_align(source, stats, options_of(source, align="activations"))
    assert any("no hidden activations of layers [0, 1, 2]" in note for note in grouping.notes)
    for e, order in grouping.orders[0].items():
        assert order.indices().tolist() == found_again(orders[0], e)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "nemotron_h", "aria_text"])
def test_shuffled_neurons_compute_the_same(family: str, pairs: Pairs, tmp_path: Path) -> None:
    """The helper of these tests does what it says."""
    source, _, _ = pairs(family)
    moe = all_architectures()[family].moe(source.config)
    same = {e: e for e in range(moe.num_experts)}
    other, _ = rewired(source, tmp_path / "same", same, seed=9)
    assert error(run(other, BATCHES), run(source, BATCHES)) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_rows_that_stay_behind(family: str, pairs: Pairs, tmp_path: Path) -> None:
    source, stats, _ = pairs(family)
    plan = mc.merge(source, stats, options_of(source))
    written = mc.write(plan, tmp_path / "out")
    expected = run(plan, BATCHES)
    for line in all_architectures()[family].router:

        def left_behind(tensors: dict[str, torch.Tensor], line: object = line) -> None:
            for layer in plan.decided["groups"]:
                name = line.name.format(i=layer)
                rows = tensors[name].shape[line.dim]
                tensors[name] = source.read(name).narrow(line.dim, 0, rows)

        broken = mutant(written, tmp_path / f"broken {line.kind}", tensors=left_behind)
        assert error(run(broken, BATCHES), expected) > 1e-4, line.name


@pytest.mark.parametrize("family", ["minimax_m2", "gpt_oss", "deepseek_v3"])
def test_copies_that_no_token_reaches(family: str, pairs: Pairs, tmp_path: Path) -> None:
    """Merging an expert with a copy that the router never chooses gives the source's own logits."""
    source, _, _ = pairs(family)
    biases = [t for t in all_architectures()[family].router if t.kind.endswith("bias")]

    def out_of_reach(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if any(name.endswith(t.name.partition("{i}")[2]) for t in biases):
                tensors[name][1::2] -= 1e4

    half = {"num_experts_per_tok": 2, "topk_group": 2}

    def fewer(config: dict) -> None:
        config.update({k: v for k, v in half.items() if k in config})

    source = mutant(source, tmp_path / "source", tensors=out_of_reach, config=fewer)
    stats = measured(source, tmp_path / "stats")
    moe = all_architectures()[family].moe(source.config)
    plan = mc.merge(source, stats, options_of(source, keep=moe.num_experts // 2))
    assert all(g[0] % 2 == 0 for groups in plan.decided["groups"].values() for g in groups)
    assert error(run(plan, BATCHES), run(source, BATCHES)) <= 1e-6
