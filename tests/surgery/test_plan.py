"""The laws of a plan, one test each; pytest tests/surgery/test_plan.py."""

import json
from dataclasses import replace

import pytest
import torch
from dense import dense_llama

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write
from moe_compose.errors import PlanError
from moe_compose.surgery.arithmetic import Full
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.transforms import Read
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

METHODS = {
    "copy": {},
    "granular": {"granularity": 2},
    "shared": {"target": "qwen2_moe"},
    "noise": {},
    "drop": {},
    "shuffle": {"granularity": 2},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_llama(tmp_path_factory.mktemp("dense"))


def plan_of(dense, method="copy", **changes):
    options = {"num_experts": 4, "top_k": 2, "method": method, **METHODS[method], **changes}
    return upcycle(dense, UpcycleOptions(**options))


class Unreadable:
    """A checkpoint whose values nobody may ask for."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        if name in ("read", "stream"):
            raise AssertionError("a plan read weights")
        return getattr(self._source, name)


@pytest.mark.parametrize("method", METHODS)
def test_building_reads_no_weights(dense, method):
    plan = plan_of(Unreadable(dense), method)
    assert plan.summary().tensors == len(plan.tensors)
    assert plan.digest()


def test_every_source_tensor_is_used_or_dropped_on_purpose(dense):
    plan = plan_of(dense)
    without = replace(plan, outputs=tuple(o for o in plan.outputs if "q_proj" not in o.name))
    with pytest.raises(PlanError, match=r"q_proj.weight .* has no home in the target"):
        without.check()


def test_every_tensor_the_target_needs_is_produced(dense):
    plan = plan_of(dense)
    gone = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    without = replace(plan, outputs=tuple(o for o in plan.outputs if o.name != gone))
    with pytest.raises(PlanError, match=f"{gone} is missing"):
        without.check()


def test_wrong_shapes_are_caught(dense):
    plan = plan_of(dense)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    wrong = OutputTensor(router, Full((3, 32), 0.0, "F32"))
    outputs = tuple(wrong if o.name == router else o for o in plan.outputs)
    with pytest.raises(PlanError, match=r"shape \[3, 32\], not \[4, 32\]"):
        replace(plan, outputs=outputs).check()


def test_names_are_unique(dense):
    plan = plan_of(dense)
    with pytest.raises(PlanError, match="same name"):
        replace(plan, outputs=(*plan.outputs, plan.outputs[0])).check()


def test_equal_plans_have_equal_digests(dense, tmp_path):
    plan = plan_of(dense, "drop")
    assert plan.digest() == plan_of(dense, "drop").digest()
    assert plan.digest() != plan_of(dense, "drop", seed=1).digest()
    assert plan.digest() != plan_of(dense, "drop", router_std=0.1).digest()
    elsewhere = tmp_path / "another name"
    write(dense, elsewhere, shard_size=20_000)
    assert plan_of(Checkpoint.open(elsewhere), "drop").digest() == plan.digest(), (
        "neither the folder's name nor the source's shards are part of a plan"
    )


def test_unchanged_tensors_are_bytes(dense):
    plan = plan_of(dense)
    moved = [n for n in plan.tensors if plan.extents(n) is not None]
    assert set(plan.tensors) - set(moved) == {
        f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(3)
    }


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_nothing_else(dense, tmp_path, method):
    """Shard size and thread count change where bytes lie, not what they are."""
    plan = plan_of(dense, method)
    one = write(plan, tmp_path / "one", workers=1)
    many = write(plan, tmp_path / "many", workers=3, shard_size=30_000)
    assert len(many.weight_files) > 1
    assert set(one.tensors) == set(many.tensors)
    for name in one.tensors:
        a, b = one.read(name), many.read(name)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_a_plan_is_a_source(dense, tmp_path):
    """Upcycling a plan that was never written equals upcycling the written checkpoint."""
    written = write(dense, tmp_path / "rewritten")
    chained = plan_of(_as_plan(dense), "drop")
    direct = plan_of(written, "drop")
    assert list(chained.tensors) == list(direct.tensors)
    for name in chained.tensors:
        assert torch.equal(chained.read(name), direct.read(name)), name
    assert chained.extents("model.norm.weight") is not None, "bytes pass through unwritten plans"


def _as_plan(dense):
    """The identity as a plan: every tensor read, nothing changed."""
    plan = plan_of(dense)
    outputs = tuple(OutputTensor(n, Read("dense", t)) for n, t in dense.tensors.items())
    return replace(plan, config=dense.config, outputs=outputs)


def test_summary_counts_as_the_model_does(dense, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = plan_of(dense)
    write(plan, tmp_path / "moe")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "moe"))
    found = plan.summary()
    assert found.parameters.total == sum(p.numel() for p in model.parameters())
    one_expert = 3 * 32 * 64
    assert found.parameters.active == found.parameters.total - 3 * (4 - 2) * one_expert
    assert found.bytes == sum(t.nbytes for t in plan.tensors.values())
    assert found.memory.weights["F32"] == 4 * found.parameters.total
    assert found.memory.cache_per_token == 2 * 2 * 3 * 2 * 8


def test_config_is_the_sources_own(dense):
    """Unknown keys survive, class defaults are written out, both dialects are there."""
    plan = plan_of(dense)
    config = dict(plan.config)
    assert config["rms_norm_eps"] == 3e-6
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["sliding_window"] is None
    json.dumps(config)


def test_unknown_keys_survive(dense, tmp_path):
    write(dense, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "our_lab": {"run": 7}}))
    assert plan_of(Checkpoint.open(tmp_path / "c")).config["our_lab"] == {"run": 7}
