"""What the REAP authors' own code measured (2510.13999, commit 1970473), on the same weights.

Run: pytest tests/calibration/test_oracle.py
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moe_compose as mc
from moe_compose.calibration.criteria import worth
from moe_compose.calibration.grouping import hc_smoe, m_smoe
from moe_compose.calibration.pruning import super_experts
from moe_compose.calibration.tokens import TokenSet
from moe_compose.routing import top_indices

#: Their names for what is measured → ours.
MEASURED = {
    "expert_frequency": "count",
    "ean_sum": "norm",
    "weighted_ean_sum": "gated_norm",
    "weighted_expert_frequency_sum": "gate",
}
PRUNED = {
    "reap": "reap",
    "frequency": "frequency",
    "ean_sum": "ean-sum",
    "ean_mean": "ean-mean",
    "weighted_ean_sum": "weighted-ean",
}


@pytest.fixture(scope="module")
def oracle(shared: Path) -> dict:
    return json.loads((shared / "oracle/qwen3_norm.json").read_text())


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    w = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    w = w.astype(np.float32)
    if "norm" in name:
        return torch.from_numpy(1 + 0.1 * w)
    return torch.from_numpy(w * np.float32(0.6 if name.endswith("mlp.gate.weight") else 0.15))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    """Their model."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("oracle")
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        rope_theta=10000.0,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name: drawn(name, tuple(t.shape)) for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return mc.Checkpoint.open(folder)


@pytest.fixture(scope="module")
def stats(oracle: dict, model: mc.Checkpoint) -> mc.ExpertStats:
    """Our measurement of it on their batches."""
    return mc.calibrate(model, tokens_of(oracle), mc.CalibrateOptions(batch=2))


def tokens_of(oracle: dict) -> TokenSet:
    """Their batches without their padding."""
    rows = [
        [i for i, m in zip(ids, mask, strict=True) if m]
        for batch in oracle["batches"]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    return TokenSet.of_ids({"text": rows})


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_measures(oracle: dict, stats: mc.ExpertStats, layer: int) -> None:
    theirs = oracle["stats_renorm_True"][str(layer)]
    assert theirs["total_tokens"] == stats.tokens()
    assert stats.sums(layer)["count"].tolist() == theirs["expert_frequency"]
    for name, measure in MEASURED.items():
        expected = torch.tensor(theirs[name], dtype=torch.float64)
        torch.testing.assert_close(stats.sums(layer)[measure], expected, rtol=1e-6, atol=0)
    expected = torch.tensor(theirs["reap"], dtype=torch.float64)
    torch.testing.assert_close(worth(stats, layer, "reap"), expected, rtol=0, atol=1e-6)
    expected = torch.tensor(theirs["ean_mean"], dtype=torch.float64)
    torch.testing.assert_close(worth(stats, layer, "ean-mean"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("theirs", "ours"), PRUNED.items())
def test_kept_sets(oracle: dict, stats: mc.ExpertStats, theirs: str, ours: str) -> None:
    for layer, kept in oracle["pruned"][theirs]["kept"].items():
        assert sorted(top_indices(worth(stats, int(layer), ours), 4).tolist()) == kept


@pytest.mark.parametrize(("theirs", "ours"), PRUNED.items())
def test_pruned(
    oracle: dict,
    model: mc.Checkpoint,
    stats: mc.ExpertStats,
    theirs: str,
    ours: str,
    tmp_path: Path,
) -> None:
    """What is kept, and what the pruned model says; and another one says something else."""
    expected = oracle["pruned"][theirs]
    options = mc.PruneOptions(ratio=0.5, criterion=ours, super_experts="ignore")
    plan = mc.prune(model, stats, options)
    assert plan.decided["kept"] == expected["kept"]
    written = mc.write(plan, tmp_path / "pruned")
    batch = oracle["batches"][0]
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    pruned = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.float32).eval()
    with torch.no_grad():
        probe = pruned(input_ids=ids, attention_mask=mask).logits[0, -1, :8]
    torch.testing.assert_close(probe, torch.tensor(expected["logits_probe"]), rtol=0, atol=5e-6)
    assert (probe - torch.tensor(oracle["logits_probe"])).abs().max() > 1e-2


def test_super_expert(oracle: dict, stats: mc.ExpertStats) -> None:
    """By their table: it has the largest signed value, ours the largest absolute one."""
    layers = {}
    for layer, sums in stats.layers.items():
        peaks = torch.tensor(oracle["stats_renorm_True"][str(layer)]["max_activations"])
        layers[layer] = replace(sums, peak_HCE=peaks.double().expand_as(sums.peak_HCE))
    found = super_experts(replace(stats, layers=layers), 3)
    assert [[i, e] for i, x in found.items() for e in x] == oracle["super_experts_renorm_True"]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_groups(oracle: dict, model: mc.Checkpoint, layer: int, tmp_path: Path) -> None:
    """Both clusterings, into as many groups as there.

    In layer 0 their M-SMoE lets nobody join expert 1, though its logits are those most like those
    of experts 0 and 7 (cosines 0.024 and 0.235); they go to the next best.
    """
    options = mc.CalibrateOptions(batch=2, similarity=True)
    stats = mc.calibrate(model, tokens_of(oracle), options, output=tmp_path / "stats")
    found, count = stats.similarity(layer), stats.sums(layer)["count"]
    theirs = oracle["clusters"]["hc_smoe"]["labels"][str(layer)]
    assert labels(hc_smoe(found.mean_ED, count, len(set(theirs)))) == numbered(theirs)
    theirs = oracle["clusters"]["m_smoe"]["labels"][str(layer)]
    gate_EE = found.gate_EE
    ours = labels(m_smoe(gate_EE, count, len(set(theirs))))
    if layer == 0:
        assert [e for e in range(8) if ours[e] == ours[1]] == [0, 1, 7]
        gate_EE[:, 1] = -2
        ours = labels(m_smoe(gate_EE, count, len(set(theirs))))
    assert ours == numbered(theirs)


def labels(groups: list[list[int]]) -> list[int]:
    homes = {e: j for j, group in enumerate(groups) for e in group}
    return numbered([homes[e] for e in sorted(homes)])


def numbered(found: list[int]) -> list[int]:
    """Labels by first appearance."""
    seen: dict[int, int] = {}
    return [seen.setdefault(label, len(seen)) for label in found]
