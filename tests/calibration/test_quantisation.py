"""Which experts get how many bits: against sums by hand, and the recipe's expressions against the
names that modules have.

Run: pytest tests/calibration/test_quantisation.py
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_compose as mc
from moe_compose.calibration import quantisation
from moe_compose.calibration.quant_options import SENSITIVITIES, QuantPlanOptions
from moe_compose.calibration.quantisation import QuantPlan, plan_quantisation
from moe_compose.calibration.tokens import TokenSet
from moe_compose.reporting.quant_recipe import PLAN_NAME, RECIPE_NAME, recipe_of, write_quant_plan

E = 6


@pytest.fixture(scope="module")
def moe(tiny: Any) -> mc.Checkpoint:
    return tiny("qwen3_moe", decoder_sparse_step=1)


@pytest.fixture(scope="module")
def stats(moe: mc.Checkpoint, tokens: TokenSet) -> mc.ExpertStats:
    return mc.calibrate(moe, tokens, mc.CalibrateOptions(dtype="float64"))


@pytest.fixture(autouse=True)
def _no_super_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's largest expert counts as one; tests that mean it say so."""
    monkeypatch.setattr(quantisation, "super_experts", lambda stats, layers: {})


def bits(plan: QuantPlan) -> dict[tuple[int, int], int]:
    return {(x.layer, e): b for x in plan.layers for e, b in enumerate(x.bits)}


def by_hand(stats: mc.ExpertStats, formula: Any) -> list[tuple[int, int]]:
    """Layer and expert, the least sensitive first, by a formula over the sums."""
    shares = {}
    for layer in stats.layers:
        s = stats.sums(layer)
        each = [formula({k: float(v[e]) for k, v in s.items()}) for e in range(E)]
        shares |= {(layer, e): w / sum(each) for e, w in enumerate(each)}
    return sorted(shares, key=lambda key: (shares[key], key))


@pytest.mark.parametrize(
    ("sensitivity", "formula"),
    [
        ("mc", lambda s: s["count"] * s["gate"]),
        ("weighted-ean", lambda s: s["gated_norm"]),
        ("frequency", lambda s: s["count"]),
    ],
)
def test_the_least_sensitive_get_the_lower_bits(
    moe: mc.Checkpoint, stats: mc.ExpertStats, sensitivity: Any, formula: Any
) -> None:
    options = QuantPlanOptions(sensitivity=sensitivity, share=0.5, bits_low=3, bits_high=6)
    plan = plan_quantisation(moe, stats, options)
    order = by_hand(stats, formula)
    low = {key for key, b in bits(plan).items() if b == 3}
    assert low == set(order[: len(order) // 2]) != set(order[len(order) // 2 :])
    for layer in plan.layers:
        assert sum(layer.sensitivity) == pytest.approx(1)
    weights = {(x.layer, e): w for x in plan.layers for e, w in enumerate(x.sensitivity)}
    assert plan.low_weight == pytest.approx(sum(weights[k] for k in low) / len(stats.layers))
    assert plan.low_weight < 0.5 and plan.mean_bits == 4.5


def test_the_default_is_mixture_compressors(moe: mc.Checkpoint, stats: mc.ExpertStats) -> None:
    plan = plan_quantisation(moe, stats)
    assert plan.options.measure == "mc" and "2410.06270" in plan.to_json()["formula_source"]
    assert plan.count(4) == round(0.25 * E * len(stats.layers)) and plan.count(8)


def test_whole_layers(moe: mc.Checkpoint, stats: mc.ExpertStats) -> None:
    plan = plan_quantisation(moe, stats, QuantPlanOptions(per="layer", share=0.34))
    ratio = {
        i: float(stats.sums(i)["gated_norm"].sum() / x.input_HC.sum())
        for i, x in stats.layers.items()
    }
    low = {x.layer for x in plan.layers if set(x.bits) == {4}}
    assert low == {min(ratio, key=lambda i: ratio[i])}
    assert all(x.sensitivity[0] == pytest.approx(ratio[x.layer]) for x in plan.layers)
    assert not any("vLLM gives" in note for note in plan.notes)


@pytest.mark.parametrize("budget", [4, 4.3, 5, 7.99, 8])
@pytest.mark.parametrize("per", ["expert", "layer"])
def test_a_budget_is_met_and_never_exceeded(
    moe: mc.Checkpoint, stats: mc.ExpertStats, budget: float, per: Any
) -> None:
    plan = plan_quantisation(moe, stats, QuantPlanOptions(budget=budget, per=per))
    step = 4 / (len(stats.layers) * (E if per == "expert" else 1))
    assert budget - step < plan.mean_bits <= budget
    assert plan.mean_bits == sum(bits(plan).values()) / len(bits(plan))


def test_bytes(moe: mc.Checkpoint, stats: mc.ExpertStats) -> None:
    """Weights and scales, counted expert by expert."""
    plan = plan_quantisation(moe, stats, QuantPlanOptions(group_size=8, share=0.5))
    matrices = 3 * 32 * 24
    after = sum(matrices * b / 8 + matrices / 8 * 2 for b in bits(plan).values())
    assert plan.group_size == 8 and plan.bytes == (len(bits(plan)) * matrices * 4, after)
    assert plan.total_bytes == (moe.total_bytes, moe.total_bytes - plan.bytes[0] + after)


def test_groups_that_do_not_divide(moe: mc.Checkpoint, stats: mc.ExpertStats) -> None:
    plan = plan_quantisation(moe, stats)  # rows of 32 and 24
    assert plan.group_size is None and "each row has one scale" in " ".join(plan.notes)
    assert "strategy: channel" in recipe_of(plan) and "group_size" not in recipe_of(plan)


def test_super_experts_keep_their_bits(
    moe: mc.Checkpoint, stats: mc.ExpertStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = by_hand(stats, lambda s: s["count"] * s["gate"])[0]
    monkeypatch.setattr(quantisation, "super_experts", lambda s, n: {first[0]: (first[1],)})
    plan = plan_quantisation(moe, stats)
    assert bits(plan)[first] == 8 and "super experts keep 8 bits" in " ".join(plan.notes)
    assert plan.count(4) == round(0.25 * len(bits(plan)))


def module_names(layers: list[int]) -> dict[str, tuple[int, int] | None]:
    """As transformers 5 with llm-compressor, and as the disk, name modules; None: no routed one."""
    found: dict[str, tuple[int, int] | None] = {}
    for i in layers:
        for e in range(E):
            for parent in ("mlp.experts", "block_sparse_moe.experts", "experts"):
                for leaf in ("gate_proj", "up_proj", "down_proj", "w1"):
                    found[f"model.layers.{i}.{parent}.{e}.{leaf}"] = (i, e)
        for other in ("self_attn.q_proj", "mlp.gate", "mlp.shared_experts.0.up_proj",
                      "mlp.shared_expert.up_proj", "mlp.experts"):  # fmt: skip
            found[f"model.layers.{i}.{other}"] = None
    return {**found, "lm_head": None, "model.embed_tokens": None}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("per", ["expert", "layer"])
def test_the_recipe_finds_every_expert_once(
    moe: mc.Checkpoint, stats: mc.ExpertStats, per: Any, method: Any
) -> None:
    plan = plan_quantisation(moe, stats, QuantPlanOptions(per=per, method=method, share=0.34))
    recipe = yaml.safe_load(recipe_of(plan))["quant_stage"]["quant_modifiers"]
    [(name, modifier)] = recipe.items()
    assert name == {"gptq": "GPTQModifier", "rtn": "QuantizationModifier"}[method]
    groups = modifier["config_groups"].values()
    targets = [
        (t.removeprefix("re:"), g["weights"]["num_bits"]) for g in groups for t in g["targets"]
    ]
    for module, expert in module_names(list(stats.layers)).items():
        hit = [b for pattern, b in targets if re.match(pattern, module)]  # as compressed-tensors
        assert hit == ([] if expert is None else [bits(plan)[expert]]), module
    # the control: without an end, an expression for expert 1 of layer 1 finds others too
    assert not any(re.match(p, "model.layers.11.mlp.experts.10.up_proj") for p, _ in targets)


def test_files(moe: mc.Checkpoint, stats: mc.ExpertStats, tmp_path: Path) -> None:
    plan = plan_quantisation(replace(moe, label="a\nb: [c]"), stats)
    folder = write_quant_plan(plan, tmp_path / "q")
    document = json.loads((folder / PLAN_NAME).read_text())
    assert document["layers"][0]["bits"] == list(plan.layers[0].bits)
    assert document["formula"] == SENSITIVITIES["mc"][0]
    text = (folder / RECIPE_NAME).read_text()
    assert yaml.safe_load(text).keys() == {"quant_stage"} and "load_quantizable_moe" in text
    with pytest.raises(mc.WriteError, match="already"):
        write_quant_plan(plan, folder)
    write_quant_plan(plan, folder, overwrite=True)


def test_what_cannot_be_meant(moe: mc.Checkpoint, stats: mc.ExpertStats, tiny: Any) -> None:
    wrong = QuantPlanOptions(
        bits_low=8,
        bits_high=4,
        share=2,
        budget=9,
        sensitivity="x",
        method="y",
        group_size=0,  # type: ignore[arg-type]
    )
    with pytest.raises(mc.OptionError) as caught:
        plan_quantisation(moe, stats, wrong)
    assert len(caught.value.problems) == 7
    with pytest.raises(mc.OptionError, match="the same for all layers"):
        plan_quantisation(moe, stats, QuantPlanOptions(per="layer", sensitivity="mc"))
    with pytest.raises(mc.CheckpointError, match="measured on"):
        plan_quantisation(tiny("mixtral"), stats)
    with pytest.raises(mc.UnsupportedError, match="quantised already"):
        plan_quantisation(
            replace(moe, config={**moe.config, "quantization_config": {"a": 1}}), stats
        )
    with pytest.raises(mc.UnsupportedError, match="row after row"):
        plan_quantisation(tiny("dbrx"), stats)


def test_stacked_experts_are_said(tiny: Any, tokens: TokenSet) -> None:
    moe = tiny("gpt_oss")
    plan = plan_quantisation(moe, mc.calibrate(moe, tokens))
    assert "load_quantizable_moe" in " ".join(plan.notes)
    assert torch.tensor([list(x.bits) for x in plan.layers]).shape == (3, E)
    assert {f.name for f in fields(plan)} <= plan.to_json().keys()
