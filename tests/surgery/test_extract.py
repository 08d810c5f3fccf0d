"""One expert as a dense checkpoint: the dense model back from what it was grown into, and mixtures
of equal experts, of which each alone computes what the mixture does.

    pytest tests/surgery/test_extract.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import VARIANTS, dense_checkpoint, read_config, write_config
from logits import compare, load, logits
from safetensors.torch import load_file, save_file
from tiny_models import tiny_checkpoint
from torch import Tensor

from moe_compose.architectures import all_architectures
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorInfo, TensorSource
from moe_compose.checkpoint.writer import write
from moe_compose.errors import MoeComposeError, OptionError, PlanError, UnsupportedError
from moe_compose.reporting import publish
from moe_compose.surgery import evaluate
from moe_compose.surgery.extract import extract
from moe_compose.surgery.extract_options import ExtractOptions
from moe_compose.surgery.joined import Beside
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.transforms import Read
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

PAIRS = [
    (twin.dense, form.model_type)
    for form in all_architectures().values()
    for twin in form.twins
    if not form.parallel_mlp
]


def grown(dense: str, target: str, folder: Path, **asked: Any) -> tuple[Checkpoint, Plan]:
    """A dense model in `folder`, and the plan of an MoE of two experts."""
    dense_checkpoint(dense, folder, **VARIANTS.get((dense, target), {}))
    source = Checkpoint.open(folder)
    given = {"num_experts": 2, "top_k": 2, "target": target, **asked}
    return source, upcycle(source, UpcycleOptions(**given))


def taken(source: TensorSource, expert: str = "0", target: str | None = None) -> Plan:
    return extract(source, ExtractOptions(expert=expert, target=target))


def same_bytes(a: TensorSource, b: TensorSource) -> bool:
    return a.tensors == b.tensors and all(torch.equal(a.read(n), b.read(n)) for n in a.tensors)


@pytest.mark.parametrize(("dense", "target"), PAIRS, ids=lambda x: x)
def test_what_was_grown_comes_back(dense: str, target: str, tmp_path: Path) -> None:
    source, moe = grown(dense, target, tmp_path / "dense")
    found = [taken(moe, expert) for expert in "01"]
    for plan in found:
        assert plan.config["model_type"] == dense
        assert plan.tensors.keys() == source.tensors.keys()
        assert all(torch.equal(plan.read(n), source.read(n)) for n in source.tensors)
    write(found[1], tmp_path / "back")
    expected, back = (logits(load(tmp_path / name)) for name in ("dense", "back"))
    assert compare(expected, back).relative <= 1e-6


def test_experts_that_differ_do_not_come_back(tmp_path: Path) -> None:
    source, moe = grown("llama", "mixtral", tmp_path, method="noise")
    first, second = (taken(moe, expert) for expert in "01")
    name = "model.layers.1.mlp.down_proj.weight"
    expert = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(second.read(name), moe.read(expert))
    assert not torch.equal(first.read(name), second.read(name))
    assert not torch.equal(second.read(name), source.read(name))
    assert same_bytes(taken(moe, "1"), second)


# Mixtures of equal experts: whatever the router says, each expert alone is the mixture.

_DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 72}
_WHOLE_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}

#: MoE family → entries of the tiny model, and of its `config.json` afterwards.
EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({}, {}),
    "qwen3_moe": ({"norm_topk_prob": True, "decoder_sparse_step": 1}, {}),
    "flex_olmo": ({"norm_topk_prob": True}, {}),
    "granitemoe": ({}, {}),
    "granitemoeshared": ({}, {}),
    "granitemoehybrid": ({}, {}),
    "deepseek_v3": (_DENSE_FIRST, {}),
    "glm4_moe": ({**_DENSE_FIRST, "rope_parameters": _WHOLE_ROPE}, {}),
    "dots1": ({**_DENSE_FIRST, "norm_topk_prob": True}, {"sliding_window": None}),
    "solar_open": ({}, {}),
    "ernie4_5_moe": ({"intermediate_size": 72}, {}),
    "hunyuan_v1_moe": ({}, {}),
    "lfm2_moe": ({"intermediate_size": 24}, {}),
    "cohere2_moe": (
        {"mlp_layer_types": ["sparse"] * 3, "prefix_dense_sliding_window_pattern": 4},
        {},
    ),
}


def equal_experts(family: str, folder: Path) -> Checkpoint:
    """A tiny random model all of whose experts are its first."""
    entries, edits = EQUAL[family]
    tiny_checkpoint(family, folder, **entries)
    write_config(folder, {**read_config(folder), **edits})
    lie = all_architectures()[family].experts
    assert lie is not None
    stacked = [re.escape(n).replace(r"\{i\}", r"\d+") for n in lie.names if lie.stacked]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        first = tensors[re.sub(r"experts\.\d+\.", "experts.0.", name)]
        whole = any(re.fullmatch(p, name) for p in stacked)
        tensors[name] = (tensor[:1].expand_as(tensor) if whole else first).clone().contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", EQUAL)
def test_an_expert_alone_is_a_mixture_of_its_equals(family: str, tmp_path: Path) -> None:
    """Factors on the routing weights, shared experts and dense layers included."""
    moe = equal_experts(family, tmp_path / "moe")
    write(taken(moe, "1"), tmp_path / "dense")
    expected = logits(load(tmp_path / "moe"))
    assert compare(expected, logits(load(tmp_path / "dense"))).relative <= 1e-6


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("glm4_moe", "routed_scaling_factor"),
        ("cohere2_moe", "shared_expert_combination_strategy"),
        ("granitemoeshared", "shared"),
    ],
)
def test_a_factor_or_a_shared_expert_forgotten_is_noticed(
    family: str, part: str, tmp_path: Path
) -> None:
    moe = equal_experts(family, tmp_path / "moe")
    plan = taken(moe, "1")
    write(plan, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("down_proj.weight", "output_linear.weight")):
            changed = tensor.clone()
            if part == "shared":
                changed[:, -56:] = 0
            else:
                width = 24 if part.startswith("routed") else tensor.shape[1]
                changed[:, :width] *= 1 / 1.5 if part.startswith("routed") else 2
            tensors[name] = changed
    save_file(tensors, file, {"format": "pt"})
    expected = logits(load(tmp_path / "moe"))
    assert compare(expected, logits(load(tmp_path / "dense"))).relative > 1e-3


def test_weights_that_are_not_renormalised_are_undone_as_upcycling_does(tmp_path: Path) -> None:
    asked = {"num_experts": 4, "allow": ("unnormalised",)}
    source, moe = grown("qwen3", "qwen3_moe", tmp_path, **asked)
    plan = taken(moe)
    assert all(torch.equal(plan.read(n), source.read(n)) for n in source.tensors)
    assert any("does not renormalise" in note and "0.5 = k/E" in note for note in plan.notes)


# What the record says.


def on_disk(dense: str, target: str, folder: Path, **asked: Any) -> tuple[Checkpoint, Checkpoint]:
    """A dense model, and an MoE with its record."""
    source, plan = grown(dense, target, folder / "dense", **asked)
    return source, publish.write(plan, folder / "moe")


def without_record(moe: Checkpoint) -> Checkpoint:
    assert moe.path is not None
    (moe.path / "moe_compose.json").unlink()
    return Checkpoint.open(moe.path)


def test_a_shared_expert_that_is_silent_by_the_record_is_left_out(tmp_path: Path) -> None:
    source, moe = on_disk("llama", "glm4_moe", tmp_path)
    plan = taken(moe)
    assert all(torch.equal(plan.read(n), source.read(n)) for n in source.tensors)
    assert any("silent" in note for note in plan.notes)


def test_without_a_record_it_is_kept(tmp_path: Path) -> None:
    """Twice the width, and the same function."""
    source, moe = on_disk("llama", "glm4_moe", tmp_path)
    plan = taken(without_record(moe))
    width = source.config["intermediate_size"]
    assert plan.config["intermediate_size"] == 2 * width
    assert plan.tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 2 * width)
    write(plan, tmp_path / "back")
    expected, back = (logits(load(tmp_path / name)) for name in ("dense", "back"))
    assert compare(expected, back).relative <= 1e-6


def test_a_later_operation_that_changes_it_is_believed(tmp_path: Path) -> None:
    _, moe = on_disk("llama", "glm4_moe", tmp_path)
    assert moe.path is not None
    file = moe.path / "moe_compose.json"
    records = json.loads(file.read_text())
    name = "model.layers.*.mlp.shared_experts.down_proj.weight"
    assert name in records[0]["constants"]
    for copied, width in (([name], 48), ([], 96), (None, 96), (name, 96)):
        later = {"operation": "replace", "copied": copied, "constants": []}
        file.write_text(json.dumps([*records, later]))
        assert taken(Checkpoint.open(moe.path)).config["intermediate_size"] == width


@pytest.mark.parametrize("target", ["glm4_moe", "ernie4_5_moe"])
def test_silent_experts_leave_the_shared_one(target: str, tmp_path: Path) -> None:
    source, moe = on_disk("llama", target, tmp_path, method="shared")
    plan = taken(moe, target="llama")
    assert all(torch.equal(plan.read(n), source.read(n)) for n in source.tensors)


def test_a_gated_shared_expert_is_refused(tmp_path: Path) -> None:
    source, moe = on_disk("qwen2", "qwen2_moe", tmp_path)
    assert same_bytes(taken(moe), source)
    with pytest.raises(UnsupportedError, match="behind a gate that each token opens differently"):
        taken(without_record(moe))


def test_the_family_that_it_was_grown_from(tmp_path: Path) -> None:
    """By the record, where one names it; else the most portable, which computes the same."""
    source, moe = on_disk("phi3", "mixtral", tmp_path)
    assert moe.path is not None
    write_config(moe.path, {**read_config(moe.path), "sliding_window": None})
    file = moe.path / "moe_compose.json"
    records = json.loads(file.read_text())
    records[0]["sources"] = [{"label": "dense", "model_type": "phi3"}]
    file.write_text(json.dumps(records))
    moe = Checkpoint.open(moe.path)
    assert same_bytes(taken(moe), source)
    write(taken(moe), tmp_path / "phi3")
    records[0]["sources"] = "nothing"
    file.write_text(json.dumps(records))
    plan = taken(Checkpoint.open(moe.path))
    assert plan.config["model_type"] == "llama"
    write(plan, tmp_path / "llama")
    expected, back = (logits(load(tmp_path / name)) for name in ("phi3", "llama"))
    assert compare(expected, back).relative <= 1e-6


def test_a_constant_that_may_have_been_trained_has_no_home(tmp_path: Path) -> None:
    """GraniteMoE has a bias that Qwen2 has not; as long as it is 0 by the record, it may go."""
    source, moe = on_disk("qwen2", "granitemoe", tmp_path)
    assert same_bytes(taken(moe, target="qwen2"), source)
    moe = without_record(moe)
    with pytest.raises(UnsupportedError, match=r"o_proj\.bias has no home") as caught:
        taken(moe, target="qwen2")
    assert "--target" in caught.value.hint
    assert taken(moe).config["model_type"] == "granite"


# What is refused.


def edited(moe: Plan, folder: Path, **entries: Any) -> Checkpoint:
    """The MoE on disk with other entries; None removes one."""
    write(moe, folder)
    config = {**read_config(folder), **entries}
    write_config(folder, {k: v for k, v in config.items() if v != "nothing"})
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("pair", "entries", "target", "said"),
    [
        (("llama", "mixtral"), {"sliding_window": 9}, "llama", "sliding_window (9) would become"),
        (("qwen3", "qwen3_moe"), {"use_sliding_window": True}, None, "use_sliding_window (True)"),
        (
            ("llama", "mixtral"),
            {"rope_theta": "nothing", "rope_parameters": "nothing", "rope_scaling": "nothing"},
            None,
            "rope_theta is not stated; llama would assume 10000.0",
        ),
        (("llama", "glm4_moe"), {"use_qk_norm": True}, "llama", "use_qk_norm (True) would become"),
        (("llama", "glm4_moe"), {"attention_bias": True}, "llama", "attention_bias (True) would"),
        (("llama", "glm4_moe"), {"use_qk_norm": "nothing"}, "llama", "use_qk_norm is not stated"),
        (
            ("qwen3", "mellum"),
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0},
                }
            },
            None,
            "rope_parameters per layer type have no home",
        ),
    ],
    ids=lambda x: "" if isinstance(x, Mapping) else None,
)
def test_an_entry_without_a_home_is_named(
    pair: tuple[str, str], entries: dict[str, Any], target: str | None, said: str, tmp_path: Path
) -> None:
    _, moe = grown(*pair, tmp_path / "dense")
    assert taken(moe, target=target).config["model_type"] == pair[0]
    with pytest.raises(UnsupportedError) as caught:
        taken(edited(moe, tmp_path / "moe", **entries), target=target)
    assert any(said in p for p in caught.value.problems), caught.value.problems


def test_a_window_makes_it_mistrals(tmp_path: Path) -> None:
    """Found by itself: the first family that has a home for it."""
    _, moe = grown("llama", "mixtral", tmp_path / "dense")
    window = edited(moe, tmp_path / "moe", sliding_window=9)
    plan = taken(window)
    assert (plan.config["model_type"], plan.config["sliding_window"]) == ("mistral", 9)
    write(plan, tmp_path / "back")
    expected, back = (logits(load(tmp_path / name)) for name in ("moe", "back"))
    assert compare(expected, back).relative <= 1e-6


def test_dense_layers_of_another_width(tmp_path: Path) -> None:
    tiny_checkpoint("qwen3_moe", tmp_path)
    with pytest.raises(UnsupportedError, match=r"FFNs of width 40, the expert has 24"):
        taken(Checkpoint.open(tmp_path))


def test_a_prediction_layer_is_left_behind(tmp_path: Path) -> None:
    source, plan = grown("llama", "glm4_moe", tmp_path / "dense")
    moe = publish.write(plan, tmp_path / "moe")
    assert moe.path is not None
    tensors = load_file(moe.path / "model.safetensors")
    extra: dict[str, Tensor] = {
        "model.layers.3.eh_proj.weight": torch.ones(2, 2),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(2, 2),
    }
    save_file(tensors | extra, moe.path / "model.safetensors", {"format": "pt"})
    write_config(moe.path, {**read_config(moe.path), "num_nextn_predict_layers": 1})
    found = taken(Checkpoint.open(moe.path))
    assert same_bytes(found, source)
    assert "num_nextn_predict_layers" not in found.config
    assert "prediction" in found.dropped["moe:model.layers.3.eh_proj.weight"]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gemma4_text", "beside a dense FFN"),
        ("olmoe", "no dense family computes what olmoe does"),
        ("llama", "has no experts"),
        ("deepseek_v4", "no dense family computes"),
    ],
)
def test_families_without_a_twin(family: str, said: str, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path)
    with pytest.raises(MoeComposeError, match=said):
        taken(Checkpoint.open(tmp_path))


def test_another_target_is_no_twin(tmp_path: Path) -> None:
    _, moe = grown("llama", "mixtral", tmp_path)
    with pytest.raises(UnsupportedError, match="no dense qwen3 computes what mixtral") as caught:
        taken(moe, target="qwen3")
    assert "llama, mistral, phi3" in caught.value.hint


def test_a_quantised_mixture_is_refused(tmp_path: Path) -> None:
    _, moe = grown("llama", "mixtral", tmp_path / "dense")
    quantised = edited(moe, tmp_path / "moe", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedError, match="it is quantised"):
        taken(quantised)


def test_an_expert_by_name(tmp_path: Path) -> None:
    _, moe = grown("llama", "mixtral", tmp_path / "dense", method="noise")
    named = edited(moe, tmp_path / "moe", expert_names=[None, "math"])
    plan = taken(named, "math")
    assert plan.decided == {"expert": 1, "target": "llama"}
    assert plan.config.keys().isdisjoint({"expert_names", "num_local_experts"})
    assert same_bytes(plan, taken(named, "1"))
    with pytest.raises(OptionError, match=r"experts are 0 to 1, by name math"):
        taken(named, "code")


def test_matrices_side_by_side() -> None:
    x, y = torch.arange(6.0).reshape(2, 3), torch.arange(4.0).reshape(2, 2)
    leaves = [Read("s", TensorInfo.of("t", "F32", tuple(t.shape))) for t in (x, y)]
    node = Beside(tuple(leaves))
    evaluate.check_on_meta(node)
    assert node.apply(x, y).tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 2, 3]]
    with pytest.raises(PlanError, match="side by side"):
        _ = Beside((leaves[0], Read("s", TensorInfo.of("t", "F32", (3, 3))))).spec
