"""Selecting experts: names, rows and config of tensors that are made by hand, quantised ones too.

pytest tests/surgery/test_selection.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Tensors, mutant
from pruned import error, lively_checkpoint, masked_run, raw, run, selected
from streamed import make_batches

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.surgery import evaluate
from moe_compose.surgery.evaluate import check_on_meta
from moe_compose.surgery.roles import Roles
from moe_compose.surgery.tables import Renumber
from moe_compose.surgery.transforms import Read

BATCHES = make_batches()
KEPT = {0: [0, 2, 5], 1: [1, 2, 3], 2: [0, 4, 5]}

Change = Callable[[Tensors], object]


def made(family: str, folder: Path, tensors: Change, config: Any = None, **changes: Any):
    """A tiny checkpoint, changed by hand."""
    tiny = lively_checkpoint(family, folder / "tiny", **changes)
    return mutant(tiny, folder / "made", tensors, config)


def config_of(checkpoint: mc.Checkpoint, name: str) -> Any:
    assert checkpoint.path
    return json.loads((checkpoint.path / "config.json").read_text())[name]


# quantised


def to_fp8(tensors: Tensors) -> None:
    for name in [n for n in tensors if ".experts." in n]:
        weight = tensors[name]
        scale = weight.abs().amax() / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        tensors[name.replace(".weight", ".input_scale")] = torch.rand(())


FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": [
        "lm_head",
        "model.layers.0.block_sparse_moe.experts.1.w1",
        "model.layers.0.block_sparse_moe.experts.5.w2",
        "layers.1.block_sparse_moe.experts.2",
    ],
}


def test_fp8_experts_keep_their_bytes_and_their_scales(tmp_path: Path) -> None:
    source = made("mixtral", tmp_path, to_fp8, lambda c: c.update(quantization_config=FP8))
    plan = selected(source, KEPT)
    written = mc.write(plan, tmp_path / "out")
    for layer, ids in KEPT.items():
        for new, old in enumerate(ids):
            for rest in ("w1.weight", "w2.weight_scale_inv", "w3.input_scale"):
                at = f"model.layers.{layer}.block_sparse_moe.experts"
                assert raw(written, f"{at}.{new}.{rest}") == raw(source, f"{at}.{old}.{rest}")
    assert config_of(written, "quantization_config")["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.block_sparse_moe.experts.2.w2",
        "layers.1.block_sparse_moe.experts.1",
    ]
    assert config_of(written, "num_local_experts") == 3
    assert error(run(written, BATCHES), masked_run(source, KEPT, BATCHES)) <= 1e-6


def to_mxfp4(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator)
        tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
        scales = torch.randint(122, 126, shape[:-1], generator=generator)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)


def test_mxfp4_blocks_and_scales_are_moved_by_rows(tmp_path: Path) -> None:
    def config(c: dict) -> None:
        c["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}

    source = made("gpt_oss", tmp_path, to_mxfp4, config, intermediate_size=32)
    plan = selected(source, KEPT)
    written = mc.write(plan, tmp_path / "out")
    for layer, ids in KEPT.items():
        for rest in ("gate_up_proj_blocks", "down_proj_scales", "gate_up_proj_bias"):
            name = f"model.layers.{layer}.mlp.experts.{rest}"
            assert plan.extents(name) is not None
            assert torch.equal(written.read(name), source.read(name)[ids])
    assert error(run(written, BATCHES), masked_run(source, KEPT, BATCHES)) <= 1e-6


def to_packed(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if ".experts." in n]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator)
        tensors[f"{stem}.weight_packed"] = packed.to(torch.int32)
        tensors[f"{stem}.weight_scale"] = torch.rand(rows, columns // 8, generator=generator) / 20
        tensors[f"{stem}.weight_shape"] = torch.tensor([rows, columns])


def test_packed_experts_are_moved_by_prefix(tmp_path: Path) -> None:
    ignored = [f"model.layers.2.mlp.experts.{e}.up_proj" for e in range(6)]
    stated = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        "ignore": ["lm_head", "re:.*mlp.gate$", *ignored],
    }
    source = made(
        "qwen3_moe", tmp_path, to_packed, lambda c: c.update(quantization_config=stated),
        decoder_sparse_step=1,
    )  # fmt: skip
    written = mc.write(selected(source, KEPT), tmp_path / "out")
    at = "model.layers.1.mlp.experts"
    for rest in ("up_proj.weight_packed", "down_proj.weight_scale", "gate_proj.weight_shape"):
        assert raw(written, f"{at}.0.{rest}") == raw(source, f"{at}.1.{rest}")
    ignore = config_of(written, "quantization_config")["ignore"]
    assert ignore == ["lm_head", "re:.*mlp.gate$", *ignored[:3]]
    assert error(run(written, BATCHES), masked_run(source, KEPT, BATCHES)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (r"re:.*experts\.3\..*", "by a pattern"),
        ("experts.3.w1", "of no layer"),
        ("model.layers.9.block_sparse_moe.experts.0.w1", "of no layer"),
    ],
)
def test_lists_that_cannot_be_rewritten(name: str, why: str, tmp_path: Path) -> None:
    stated = {**FP8, "modules_to_not_convert": [name]}
    source = made("mixtral", tmp_path, to_fp8, lambda c: c.update(quantization_config=stated))
    with pytest.raises(mc.UnsupportedError, match=why):
        selected(source, KEPT)


# multi-token prediction


def with_mtp(tensors: Tensors) -> None:
    """One more layer after the last, as DeepSeek publishes it: its own experts and router."""
    for name in [n for n in tensors if n.startswith("model.layers.2.")]:
        tensors[name.replace("layers.2.", "layers.3.")] = torch.rand_like(tensors[name])
    tensors["model.layers.3.eh_proj.weight"] = torch.rand(32, 64)


def deepseek(folder: Path) -> mc.Checkpoint:
    return made("deepseek_v3", folder, with_mtp, lambda c: c.update(num_nextn_predict_layers=1))


SIX = {2: [0, 1, 3, 4, 6, 7]}


def test_mtp_is_pruned_by_the_ids_of_the_last_layer(tmp_path: Path) -> None:
    source = deepseek(tmp_path)
    plan = selected(source, SIX)
    assert plan.config["num_nextn_predict_layers"] == 1
    gate, bias = "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.e_score_correction_bias"
    for name in (gate, bias):
        assert torch.equal(plan.read(name), source.read(name)[SIX[2]])
    at = "model.layers.3.mlp.experts"
    assert torch.equal(plan.read(f"{at}.5.up_proj.weight"), source.read(f"{at}.7.up_proj.weight"))
    assert f"{at}.6.up_proj.weight" not in plan.tensors
    assert "model.layers.3.eh_proj.weight" in plan.tensors
    pruned = mc.prune(source, {2: range(8)}, mc.PruneOptions(keep=6, criterion="given"))
    assert pruned.decided["kept_mtp"] == {"model.layers.3": [0, 1, 2, 4, 5, 6]}
    assert any("drafts" in note for note in pruned.notes)


def test_mtp_dropped_or_refused(tmp_path: Path) -> None:
    source = deepseek(tmp_path)
    plan = selected(source, SIX, mtp="drop")
    assert plan.config["num_nextn_predict_layers"] == 0
    assert not any(".layers.3." in name for name in plan.tensors)
    assert all("multi-token" in plan.dropped[n] for n in plan.dropped if ".layers.3." in n)
    with pytest.raises(mc.UnsupportedError, match="cannot keep another number"):
        selected(source, SIX, mtp="keep")
    same = selected(source, {2: [3, 2, 1, 0, 4, 5, 6, 7]}, mtp="keep")
    for name in source.tensors:
        if ".layers.3." in name:
            assert raw(same, name) == raw(source, name)


def test_mtp_under_another_name(tmp_path: Path) -> None:
    def tensors(found: Tensors) -> None:
        for name in [n for n in found if n.startswith("model.layers.2.mlp.")]:
            found[name.replace("model.layers.2", "mtp.layers.0")] = torch.rand_like(found[name])

    source = made("qwen3_next", tmp_path, tensors)
    plan = selected(source, {0: [0, 1, 2, 3], 2: [0, 1, 2, 4]})
    name = "mtp.layers.0.mlp.gate.weight"
    assert torch.equal(plan.read(name), source.read(name)[[0, 1, 2, 4]])
    dropped = selected(source, {0: [0, 1, 2, 3], 2: [0, 1, 2, 4]}, mtp="drop")
    assert dropped.config["num_nextn_predict_layers"] == 0


# refusals, repetition, tables


def test_what_is_not_understood_is_refused_all_at_once(tmp_path: Path) -> None:
    def tensors(found: Tensors) -> None:
        found["model.layers.0.block_sparse_moe.extra_experts.1.w"] = torch.rand(2)
        found["model.layers.0.experts.1.w"] = torch.rand(2)
        found["model.layers.0.block_sparse_moe.gate.zero"] = torch.rand(2, 32)
        del found["model.layers.1.block_sparse_moe.experts.4.w1.weight"]

    source = made("mixtral", tmp_path, tensors)
    with pytest.raises(mc.UnsupportedError) as caught:
        selected(source, KEPT)
    said = "\n".join(caught.value.problems)
    assert "model.layers.0.experts.1.w belongs to an expert that the form does not know" in said
    assert "gate.zero has shape [2, 32]" in said
    assert "w1.weight is missing for experts 4" in said
    assert "extra_experts" not in said


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({0: [0, 1]}, "layers"),
        ({0: [0, 1], 1: [0, 1], 2: [0]}, "as many experts"),
        ({0: [0], 1: [1], 2: [2]}, "fewer than top_k"),
        ({0: [0, 6], 1: [0, 1], 2: [0, 1]}, "experts must be 0 to 5"),
    ],
)
def test_choices_that_cannot_be(chosen: dict, why: str, tmp_path: Path) -> None:
    source = lively_checkpoint("mixtral", tmp_path / "tiny")
    with pytest.raises(mc.UnsupportedError, match=why):
        selected(source, chosen)


def test_groups_stay_groups(tmp_path: Path) -> None:
    source = lively_checkpoint("deepseek_v3", tmp_path / "tiny")
    selected(source, {2: [4, 5, 6, 0, 1, 2]})
    for ids, why in (
        ([0, 1, 2, 3, 4, 5], "must stay in their 2 groups"),
        ([0, 1, 2, 4, 5], "do not divide into 2 groups"),
        ([0, 1, 4, 5], "hold fewer than top_k"),
    ):
        with pytest.raises(mc.UnsupportedError, match=why):
            selected(source, {2: ids})


def test_experts_may_be_there_twice(tmp_path: Path) -> None:
    """Twins under twice the top-k, weights divided by their sum: the same model."""
    source = lively_checkpoint("mixtral", tmp_path / "tiny")
    chosen = {i: [e for e in range(6) for _ in (0, 1)] for i in range(3)}
    plan = selected(source, chosen)
    assert plan.config["num_local_experts"] == 12
    written = mc.write(plan, tmp_path / "out")
    doubled = mutant(written, tmp_path / "k", config=lambda c: c.update(num_experts_per_tok=4))
    assert error(run(doubled, BATCHES), run(source, BATCHES)) <= 1e-6


def test_nested_and_listed_counts(tmp_path: Path) -> None:
    dbrx = lively_checkpoint("dbrx", tmp_path / "dbrx")
    before = json.dumps(dbrx.config["ffn_config"])
    assert selected(dbrx, KEPT).config["ffn_config"]["moe_num_experts"] == 3
    assert json.dumps(dbrx.config["ffn_config"]) == before
    tiny = lively_checkpoint("hunyuan_v1_moe", tmp_path / "tiny")
    listed = mutant(tiny, tmp_path / "listed", config=lambda c: c.update(num_experts=[6, 6, 6]))
    assert selected(listed, KEPT).config["num_experts"] == [3, 3, 3]


def rewritten(row: list[int], kept: list[int]) -> list[int]:
    """The rule, token by token, written apart from the code under test."""
    found = [e if e in kept else None for e in row]
    for k, e in enumerate(row):
        step = e
        while found[k] is None:
            step = (step + 1) % 8
            if step in kept and step not in found:
                found[k] = step
    return [kept.index(e) for e in found]


def test_tables_of_expert_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(200, 8, generator=generator).argsort(1)[:, :3]
    for kept in ([0, 1, 2], [1, 4, 6, 7], [5, 6, 7], list(range(8))):
        node = Renumber(Read("x", TensorInfo.of("t", "I64", (200, 3))), tuple(kept), 8)
        check_on_meta(node)
        found = node.apply(table)
        assert found.tolist() == [rewritten(row, kept) for row in table.tolist()]
        assert all(len(set(row)) == 3 for row in found.tolist())


def test_a_wrong_table_is_noticed(tmp_path: Path) -> None:
    """The control: ids that were not renumbered."""
    source = lively_checkpoint("deepseek_v4", tmp_path / "tiny")
    kept = {layer: [1, 2, 4, 5, 7] for layer in range(3)}
    expected = masked_run(source, kept, BATCHES)
    written = mc.write(selected(source, kept), tmp_path / "out")
    assert error(run(written, BATCHES), expected) <= 1e-6

    def wrong(tensors: Tensors) -> None:
        name = next(n for n in tensors if n.endswith("tid2eid"))
        tensors[name] = (tensors[name] + 1) % 5

    broken = mutant(written, tmp_path / "broken", tensors=wrong)
    assert error(run(broken, BATCHES), expected) > 1e-3


def test_roles_by_name() -> None:
    forms = all_architectures()
    cases: dict[tuple[str, str], tuple | None] = {
        ("qwen3_moe", "model.layers.3.mlp.experts.12.up_proj.qweight"): ("expert", 12),
        ("qwen3_moe", "model.layers.3.mlp.gate_proj.weight"): None,
        ("deepseek_v3", "model.layers.3.mlp.shared_experts.up_proj.weight"): None,
        ("gpt_oss", "model.layers.3.mlp.experts.down_proj_scales"): ("stacked", -1),
        ("laguna", "model.layers.3.mlp.experts.e_score_correction_bias"): ("router", -1),
        ("gemma4_text", "model.layers.3.router.scale"): ("router", -1),
        ("dbrx", "transformer.blocks.3.ffn.experts.mlp.w1"): ("stacked", -1),
    }
    for (family, name), expected in cases.items():
        role = Roles(forms[family]).of(name)
        assert (None if role is None else (role.kind, role.expert)) == expected, name


# other layouts


def stacked(tensors: Tensors) -> None:
    """As Qwen publishes 3.5: experts in two tensors, gate above up."""
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        one = {
            w: torch.stack([tensors.pop(f"{at}.{e}.{w}_proj.weight") for e in range(6)])
            for w in ("gate", "up", "down")
        }
        tensors[f"{at}.gate_up_proj"] = torch.cat((one["gate"], one["up"]), 1)
        tensors[f"{at}.down_proj"] = one["down"]


def test_the_same_family_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("qwen3_5_moe_text", tmp_path, stacked)
    plan = selected(source, KEPT)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(plan.read(name), source.read(name)[KEPT[1]])
    expected = masked_run(source, KEPT, BATCHES)
    assert error(run(plan, BATCHES), expected) <= 1e-6
    monkeypatch.setattr(evaluate, "LARGE_ROW", 1)
    monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("read whole"))
    assert plan.read(name).shape == (3, 48, 32)


def published(tensors: Tensors) -> None:
    """As DeepSeek publishes V4: no `model.` in front."""
    for name in list(tensors):
        new = name.removeprefix("model.").replace("embed_tokens", "embed")
        tensors[new] = tensors.pop(name)


def test_the_same_family_under_published_names(tmp_path: Path) -> None:
    tiny = lively_checkpoint("deepseek_v4", tmp_path / "tiny")
    source = mutant(tiny, tmp_path / "made", published)
    kept = {layer: [1, 2, 4, 5, 7] for layer in range(3)}
    plan = selected(source, kept)
    assert "layers.2.ffn.experts.4.w1.weight" in plan.tensors
    assert "layers.2.ffn.experts.5.w1.weight" not in plan.tensors
    for mine, theirs in ((plan, source), (selected(tiny, kept), tiny)):
        assert len(mine.tensors) < len(theirs.tensors)
    by_name = selected(tiny, kept)
    for name in ("layers.0.ffn.gate.tid2eid", "layers.2.ffn.gate.bias"):
        assert torch.equal(plan.read(name), by_name.read(f"model.{name}"))


def test_a_family_by_another_name(tmp_path: Path) -> None:
    """Kimi K2's config names code of its own; its class is DeepSeek-V3's."""
    tiny = lively_checkpoint("deepseek_v3", tmp_path / "tiny")
    source = mutant(tiny, tmp_path / "kimi", config=lambda c: c.update(model_type="kimi_k2"))
    plan = selected(source, SIX)
    assert plan.config["n_routed_experts"] == 6
    assert error(run(plan, BATCHES), masked_run(tiny, SIX, BATCHES)) <= 1e-6
