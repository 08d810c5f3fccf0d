"""Every MoE family pruned: loads whole, computes the original with experts masked, or says why not.

    pytest tests/surgery/test_prune_families.py

Controls: router rows that stay behind, another expert kept, a correction bias that stays behind.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from logits import load
from mutants import mutant
from pruned import error, lively_checkpoint, masked_run, raw, run, selected
from streamed import make_batches
from tiny_models import TINY

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.calibration.tokens import TokenSet
from moe_compose.surgery.plan import Plan

ALL = [n for n, form in all_architectures().items() if form.is_moe and n in TINY]
FAMILIES = [n for n in ALL if not all_architectures()[n].read_only]

BATCHES = make_batches()

Tiny = Callable[[str], mc.Checkpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A family's tiny checkpoint; correction biases and tables say something."""
    made: dict[str, mc.Checkpoint] = {}

    def tiny(family: str) -> mc.Checkpoint:
        if family not in made:
            made[family] = lively_checkpoint(family, tmp_path_factory.mktemp(family) / "tiny")
        return made[family]

    return tiny


def plan_of(source: mc.Checkpoint) -> Plan:
    """Some experts kept, others in every layer; six of eight where they are in groups."""
    moe = all_architectures()[source.config["model_type"]].moe(source.config)
    keep = moe.num_experts - 2 if moe.routing.groups > 1 else 3
    return mc.prune(source, None, mc.PruneOptions(keep=keep, criterion="random", seed=3))


def kept_of(plan: Plan) -> dict[int, list[int]]:
    return {int(layer): ids for layer, ids in plan.decided["kept"].items()}


def loaded(folder: Path) -> list[torch.Tensor]:
    """Logits as transformers computes them from a folder; no key missing, none unexpected."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = load(folder)
        return [
            model(input_ids=b.ids, attention_mask=b.mask, use_cache=False).logits for b in BATCHES
        ]


def test_every_family_is_pruned_or_refused() -> None:
    """All but Kimi K2, which transformers does not know under its own name."""
    everything = {n for n, form in all_architectures().items() if form.is_moe}
    assert everything - set(ALL) == {"kimi_k2"}
    assert set(ALL) - set(FAMILIES) == {"jetmoe"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_with_experts_masked(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(family)
    plan = plan_of(source)
    expected = masked_run(source, kept_of(plan), BATCHES)
    assert error(run(plan, BATCHES), expected) <= 1e-6
    written = mc.write(plan, tmp_path / "out")
    assert error(loaded(written.path), expected) <= 1e-6
    assert error(run(source, BATCHES), expected) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_is_nothing_changed(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(family)
    moe = all_architectures()[family].moe(source.config)
    plan = mc.prune(source, None, mc.PruneOptions(keep=moe.num_experts, criterion="random"))
    assert plan.preservation.kind == "exact"
    written = mc.write(plan, tmp_path / "out")
    assert dict(written.config) == dict(source.config)
    assert written.tensors.keys() == source.tensors.keys()
    assert all(raw(written, n) == raw(source, n) for n in source.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_experts_are_the_same_model(family: str, tiny: Tiny) -> None:
    source = tiny(family)
    moe = all_architectures()[family].moe(source.config)
    groups = moe.routing.groups
    size, draw = moe.num_experts // groups, random.Random(0)
    chosen = {}
    for layer in moe.sparse_layers:
        blocks = [draw.sample(range(g * size, (g + 1) * size), size) for g in range(groups)]
        draw.shuffle(blocks)
        chosen[layer] = [e for block in blocks for e in block]
    plan = selected(source, chosen)
    assert plan.config == dict(source.config)
    assert error(run(plan, BATCHES), run(source, BATCHES)) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss", "minimax_m2"])
def test_experts_that_no_token_chose(family: str, tiny: Tiny) -> None:
    """Gone without a trace, on that text, where weights are divided by their sum."""
    source = tiny(family)
    ids = torch.tensor([[11, 57]])
    stats = mc.calibrate(source, _tokens(ids), mc.CalibrateOptions())
    assert all(len(stats.dead(layer)) >= 2 for layer in stats.layers)
    plan = mc.prune(source, stats, mc.PruneOptions(keep=4, criterion="frequency"))
    assert all(set(range(6)) - set(stats.dead(i)) <= set(k) for i, k in kept_of(plan).items())
    assert error(run(plan, [ids]), run(source, [ids])) <= 1e-6


def _tokens(ids: torch.Tensor) -> TokenSet:
    return TokenSet.of_ids({"text": [*ids.tolist(), *ids.tolist()]})


def test_without_renormalisation_even_idle_experts_count(tiny: Tiny) -> None:
    """A softmax over fewer experts gives larger weights: the masked original has them too."""
    source, ids = tiny("olmoe"), torch.tensor([[11, 57]])
    stats = mc.calibrate(source, _tokens(ids), mc.CalibrateOptions())
    plan = mc.prune(source, stats, mc.PruneOptions(keep=4, criterion="frequency"))
    assert error(run(plan, [ids]), run(source, [ids])) > 1e-3
    assert error(run(plan, [ids]), masked_run(source, kept_of(plan), [ids])) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "longcat_flash"])
def test_controls(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """What the comparison must notice."""
    source = tiny(family)
    plan = plan_of(source)
    kept = kept_of(plan)
    expected = masked_run(source, kept, BATCHES)
    written = mc.write(plan, tmp_path / "out")
    form = all_architectures()[family]
    for line in form.router:
        if line.kind == "scale":
            continue

        def left_behind(tensors: dict[str, torch.Tensor], line: object = line) -> None:
            for layer in kept:
                name = line.name.format(i=layer)
                tensors[name] = source.read(name)[: len(tensors[name])]

        broken = mutant(written, tmp_path / f"broken {line.kind}", tensors=left_behind)
        assert error(run(broken, BATCHES), expected) > 1e-4, line.name
    layer = max(kept)
    groups = form.moe(source.config).routing.groups
    size = form.moe(source.config).num_experts // groups
    gone = next(e for e in range(size) if e not in kept[layer])
    other = next(e for e in kept[layer] if e < size)
    swapped = {**kept, layer: sorted({*kept[layer], gone} - {other})}
    assert error(masked_run(source, swapped, BATCHES), expected) > 1e-4


def test_a_refused_family_says_why(tmp_path: Path) -> None:
    source = lively_checkpoint("jetmoe", tmp_path / "tiny")
    with pytest.raises(mc.UnsupportedError, match="attention has as many experts"):
        mc.prune(source, None, mc.PruneOptions(keep=4, criterion="random"))
    dense = lively_checkpoint("llama", tmp_path / "dense")
    with pytest.raises(mc.UnsupportedError, match="has no experts"):
        mc.prune(dense, None, mc.PruneOptions(keep=4, criterion="random"))
