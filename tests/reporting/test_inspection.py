"""`inspect` against counts done by hand.

Run: pytest tests/reporting/test_inspection.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hand_made import LAYERS, D, E, F, Make, V, plan_of

from moe_compose.reporting.inspect import inspect

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "models"
ATTENTION = LAYERS * (D * D * 2 + 2 * (D // 2) * D)
NORMS = LAYERS * 2 * D + D
EXPERT = 3 * D * F


def test_a_dense_model(make: Make) -> None:
    found = inspect(make())
    assert (found.kind, found.model_type, found.hf_class) == ("dense", "llama", "LlamaForCausalLM")
    assert (found.layers, found.hidden, found.vocabulary) == (LAYERS, D, V)
    assert found.sparse_layers == () and found.experts is None
    total = 2 * V * D + ATTENTION + NORMS + LAYERS * EXPERT
    assert found.total == total == found.parameters.active
    assert found.parts()["dense FFN"].total == LAYERS * EXPERT
    assert found.bytes == 4 * total
    assert found.memory.weights["BF16"] == 2 * total
    # keys and values, bf16, every layer, two key-value heads of D/4
    assert found.memory.cache_per_token == 2 * 2 * LAYERS * 2 * (D // 4)
    assert found.cache_full == 128 * found.memory.cache_per_token
    assert list(found.weight_files) == ["model.safetensors"]


def test_a_mixture(make: Make) -> None:
    found = inspect(make("mixtral"))
    assert found.kind == "moe"
    assert found.sparse_layers == tuple(range(LAYERS))
    assert found.experts is not None
    assert (found.experts.num_experts, found.experts.top_k, found.experts.width) == (E, 2, F)
    assert found.experts.routing == "softmax over all experts, then top-k, weights renormalised"
    parts = found.parts()
    assert parts["experts"].total == LAYERS * E * EXPERT
    assert parts["experts"].active == LAYERS * 2 * EXPERT
    assert parts["router"].total == parts["router"].active == LAYERS * E * D
    assert sum(p.active for p in parts.values()) == found.parameters.active


def test_json_holds_the_same(make: Make) -> None:
    found = inspect(make("mixtral"))
    document = json.loads(json.dumps(found.to_json()))
    assert document["family"] == {
        "model_type": "mixtral",
        "class": "MixtralForCausalLM",
        "kind": "moe",
    }
    assert document["parameters"]["total"] == found.total
    assert document["parameters"]["active"] == found.parameters.active
    assert "E - k" in document["parameters"]["convention"]
    assert document["layers"] == {"count": LAYERS, "sparse": [0, 1]}
    assert document["dtypes"]["F32"]["bytes"] == document["bytes"] == found.bytes
    assert document["memory"]["cache_full_context"] == found.cache_full


def test_an_unknown_family_is_shown_as_far_as_it_goes(make: Make) -> None:
    found = inspect(make("llama", model_type="no_such_family"))
    assert found.kind == "unknown" and found.parameters is None
    assert found.layers == LAYERS and found.hidden == D
    assert found.total == found.elements > 0
    assert any("no_such_family" in note for note in found.notes)
    assert found.to_json()["parameters"]["active"] is None


def test_a_config_that_lacks_what_its_family_requires(make: Make) -> None:
    found = inspect(make("mixtral", num_local_experts="many"))
    assert found.parameters is None
    assert any("num_local_experts" in note for note in found.notes)


def test_a_plan_can_be_inspected_before_it_is_written(make: Make) -> None:
    plan = plan_of(make())
    found = inspect(plan)
    assert found.kind == "moe" and found.weight_files == {}
    assert found.total == plan.summary().parameters.total
    assert [record["operation"] for record in found.history] == ["upcycle"]


def test_damaged_documents_are_said_and_left_out(make: Make) -> None:
    files = {"moe_compose.json": '{"not": "a list"}', "validation.json": "[1"}
    found = inspect(make(files=files))
    assert found.history == () and found.validation is None
    assert len([n for n in found.notes if "left out" in n]) == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real small models are not here")
def test_a_real_model() -> None:
    from moe_compose.checkpoint.reader import Checkpoint

    found = inspect(Checkpoint.open(SHARED / "moe16"))
    assert found.experts is not None
    assert (found.experts.num_experts, found.experts.top_k, found.experts.width) == (16, 4, 96)
    assert found.total == 2_827_648
