"""Merging in sequence: what each layer was measured on is what the merged model gives it.

Run: pytest tests/calibration/test_sequence.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from logits import load
from merged import measured, tokens
from pruned import error, lively_checkpoint, run
from streamed import make_batches

import moe_compose as mc
from moe_compose.calibration.calls import experts_in
from moe_compose.calibration.sequence import group_in_sequence
from moe_compose.runtime import Runner
from moe_compose.runtime.single import filled
from moe_compose.surgery.merge import merge_grouped
from moe_compose.surgery.selection import moe_form

CALIBRATION = mc.CalibrateOptions(sample=48)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_measured_behind_merged_layers(family: str, tmp_path: Path) -> None:
    """The merged model as transformers loads it, its inputs of each layer given to the original's
    layer by hand: the same choices; without the merged predecessors, others.
    """
    changes = {"first_k_dense_replace": 1} if family == "deepseek_v3" else {}
    source = lively_checkpoint(family, tmp_path / "tiny", **changes)
    _, moe = moe_form(source)
    keep = moe.num_experts - 2
    options = mc.MergeOptions(keep=keep)
    grouping, stats = group_in_sequence(source, tokens(), options, CALIBRATION)
    written = mc.write(merge_grouped(source, grouping, options), tmp_path / "out")
    behind = counted(load(written.path), source)
    plain = mc.calibrate(source, tokens(), CALIBRATION)
    for layer in moe.sparse_layers:
        assert stats.sums(layer)["count"].tolist() == behind[layer].tolist()
    first, last = moe.sparse_layers[0], moe.sparse_layers[-1]
    assert plain.sums(first)["count"].tolist() == behind[first].tolist()
    assert first != last
    assert plain.sums(last)["count"].tolist() != behind[last].tolist()


def counted(model: Any, source: mc.Checkpoint) -> dict[int, torch.Tensor]:
    """Layer → how often the original's router chooses each expert, on the inputs that `model`
    gives its own layer.
    """
    _, moe = moe_form(source)
    runner = Runner(source, prefetch=False)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    given: dict[int, list[tuple]] = {i: [] for i in moe.sparse_layers}
    for i in given:
        layers[i].register_forward_pre_hook(
            lambda module, args, kwargs, i=i: given[i].append((args, kwargs)), with_kwargs=True
        )
    with torch.no_grad():
        for sequence in tokens().sequences:
            model(torch.tensor([sequence.ids]), use_cache=False)
    found = {}
    for i, calls in given.items():
        count = torch.zeros(moe.num_experts, dtype=torch.float64)

        def see(module: Any, args: Any, kwargs: Any, count: torch.Tensor = count) -> None:
            ids = (*args, *kwargs.values())[1]
            count += torch.bincount(ids.flatten(), minlength=len(count))

        with filled(runner, i) as layer, torch.no_grad():
            experts = experts_in(layer, moe)
            assert experts is not None
            handle = experts.register_forward_pre_hook(see, with_kwargs=True)
            for args, kwargs in calls:
                layer.module(*args, **kwargs)
            handle.remove()
        found[i] = count
    return found


def test_the_first_layer_is_grouped_as_by_plain_statistics(tmp_path: Path) -> None:
    source = lively_checkpoint("mixtral", tmp_path / "tiny")
    stats = measured(source, tmp_path / "stats")
    for method in ("hc-smoe", "m-smoe", "ream"):
        options = mc.MergeOptions(keep=4, method=method)  # type: ignore[arg-type]
        plain = mc.group_and_align(source, stats, options)
        found, _ = group_in_sequence(source, tokens(), options, CALIBRATION)
        assert found.layers[0] == plain.layers[0]
        assert found.orders[0] == plain.orders[0]


def test_a_plan_like_any_other(tmp_path: Path) -> None:
    source = lively_checkpoint("qwen3_moe", tmp_path / "tiny")
    seen: list[tuple[int, int]] = []
    options = mc.MergeOptions(keep=3, method="hc-smoe")
    plan = mc.merge_in_sequence(
        source, tokens(), options, CALIBRATION, progress=lambda *x: seen.append(x)
    )
    again = mc.merge_in_sequence(source, tokens(), options, CALIBRATION)
    assert plan.digest() == again.digest()
    layers = len(plan.decided["groups"])
    assert seen == [(i + 1, layers) for i in range(layers)]
    assert plan.decided["of"]["in_sequence"]
    written = mc.write(plan, tmp_path / "out")
    assert error(run(written, make_batches()), run(plan, make_batches())) == 0
