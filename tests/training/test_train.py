"""`train_router`: what is frozen, what is kept, resuming, and what is refused.

pytest tests/training/test_train.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import few_steps
from pruned import raw
from safetensors.torch import save_file

import moe_compose as mc
from moe_compose.calibration.data import DataFile
from moe_compose.calibration.tokens import TokenSet
from moe_compose.training import train_router
from moe_compose.training.balance import bias_step
from moe_compose.training.labels import experts_of_domains

SPARSE = {"decoder_sparse_step": 1}


def report(plan: mc.Plan) -> Any:
    return plan.reports["training.json"]


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "dbrx"])
def test_other_experts_keep_their_bytes(
    tiny: Any, tokens: TokenSet, tmp_path: Path, family: str
) -> None:
    """One by one on disk, stacked, transposed, flat; under weight decay."""
    source = tiny(family)
    o = few_steps(train="router+experts=1,4", weight_decay=0.5, lr=1e-2, steps=2)
    held = TokenSet.of_ids({"a": [s.ids[:20] for s in tokens.sequences[:9]]})
    plan = train_router(source, tokens, o, held_out=held, folder=tmp_path / "work")
    state = torch.load(tmp_path / "work" / "state-0000002.0.pt", weights_only=True)
    assert report(plan)["trained"]["tensors"] == len(state["values"])
    changed = plan.sources["changed"]
    written = mc.write(plan, tmp_path / "out")
    for name in source.tensors:
        if name not in changed.tensors:
            assert raw(written, name) == raw(source, name), name
            continue
        old, new = source.read(name), written.read(name)
        rows = changed.rows.get(name)
        if rows is None:
            assert "gate" in name or "router" in name or ".1." in name or ".4." in name, name
            continue
        each = len(old) // 6
        assert {r // each for r in rows} == {1, 4}
        others = [r for r in range(len(old)) if r not in rows]
        assert torch.equal(old[others], new[others])


def test_only_chosen_rows_ever_move(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """Values after the last step, whatever is kept: chosen experts have moved, decay included."""
    source = tiny("granitemoe")
    o = few_steps(train="router+experts=1,4", weight_decay=0.5, steps=2)
    train_router(source, tokens, o, folder=tmp_path)
    values = torch.load(tmp_path / "state-0000002.0.pt", weights_only=True)["values"]
    stacked = {n: v for n, v in values.items() if "router" not in n}
    assert stacked and all(len(v) == 2 for v in stacked.values())
    moments = torch.load(tmp_path / "state-0000002.0.pt", weights_only=True)["optimizer"]["state"]
    assert sum(m["exp_avg"].numel() for m in moments.values()) == sum(
        v.numel() for v in values.values()
    )


def test_a_plan_that_was_never_written(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    source = tiny("qwen3_moe", **SPARSE)
    stats = mc.calibrate(source, tokens, mc.CalibrateOptions(device="cpu"))
    small = mc.prune(source, stats, mc.PruneOptions(keep=3))
    o = few_steps(objective="distill", steps=30, eval_every=10, lr=1e-2)
    better = train_router(small, tokens, o, teacher=source)
    found = report(better)
    assert found["best"]["loss"] < found["start"]["loss"]
    assert "pruning.json" in better.reports and "training.json" in better.reports
    written = mc.write(better, tmp_path / "out")
    history = json.loads((written.files["moe_compose.json"]).read_text())
    assert [r["operation"] for r in history] == ["prune", "train-router"]
    how = mc.EvaluateOptions(greedy=0)
    held = TokenSet.of_ids({"b": [s.ids for s in tokens.sequences if s.domain]})
    kl = [mc.evaluate(x, held, against=source, options=how).overall.kl for x in (small, written)]
    assert kl[1] < kl[0]


def test_the_start_is_kept_where_nothing_is_better(
    tiny: Any, tokens: TokenSet, tmp_path: Path
) -> None:
    """A rate that destroys: the end is much worse (the control), the result is the source."""
    source = tiny("mixtral")
    plan = train_router(source, tokens, few_steps(lr=100.0, train="all", clip=1e9))
    found = report(plan)
    assert found["best"]["step"] == 0 and found["stopped"] == "diverged"
    assert any("diverged" in note for note in plan.notes)
    assert max(found["losses"]) > found["losses"][0] + 1
    written = mc.write(plan, tmp_path / "out")
    assert all(raw(written, n) == raw(source, n) for n in source.tensors)


def test_patience(tiny: Any, tokens: TokenSet) -> None:
    o = few_steps(lr=1e-12, patience=1, steps=50, eval_every=3)
    found = report(train_router(tiny("olmoe"), tokens, o))
    assert found["stopped"] == "patience" and found["steps"] < 50


@pytest.mark.parametrize("train", ["router", "router+experts=2"])
def test_resume(tiny: Any, tokens: TokenSet, tmp_path: Path, train: str) -> None:
    """Interrupted between two states: the same losses and the same bytes as in one go."""
    source = tiny("granitemoe")
    o = few_steps(train=train, steps=7, balance="switch", lr=1e-2)

    def run(place: str, stop_at: int = 0, **how: Any) -> mc.Plan:
        def tell(progress: Any) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        stop = tell if stop_at else None
        return train_router(source, tokens, o, folder=tmp_path / place, progress=stop, **how)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=5)
    with pytest.raises(mc.WriteError, match="after step 4"):
        run("cut")
    resumed = run("cut", resume=True)
    assert report(resumed)["losses"] == report(whole)["losses"]
    assert len(report(whole)["losses"]) == 7
    assert resumed.digest() == whole.digest(), "the digest covers all values"
    lines = (tmp_path / "cut" / "training.jsonl").read_text().splitlines()
    steps = [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]
    assert steps == list(range(1, 8))
    other = replace(o, lr=2e-2)
    with pytest.raises(mc.WriteError, match="another run") as caught:
        train_router(source, tokens, other, folder=tmp_path / "cut", resume=True)
    assert caught.value.problems == ("lr: then 0.01, now 0.02",)


def test_bfloat16(tiny: Any, tokens: TokenSet) -> None:
    """Copies are fp32, and what is stored is rounded once."""
    source = tiny("qwen3_moe", dtype=torch.bfloat16, **SPARSE)
    plan = train_router(source, tokens, few_steps(dtype="bfloat16", lr=1e-2, steps=20))
    name = "model.layers.0.mlp.gate.weight"
    assert plan.tensors[name].dtype == "BF16" == source.tensors[name].dtype
    assert report(plan)["losses"][0] == pytest.approx(report(plan)["start"]["loss"], rel=0.1)


def test_tied_embeddings(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """All parameters: embedding and head stay one tensor."""
    source = tiny("qwen3_moe", tie_word_embeddings=True, **SPARSE)
    o = few_steps(train="all", lr=3e-3, steps=12, eval_every=4)
    plan = train_router(source, tokens, o)
    assert report(plan)["best"]["step"] > 0 and plan.tensors.keys() == source.tensors.keys()
    written = mc.write(plan, tmp_path / "out")
    held = TokenSet.of_ids({"a": [s.ids for s in tokens.sequences]})
    loss = [mc.evaluate(x, held).overall.loss for x in (source, written)]
    assert loss[1] < loss[0] - 0.02


def test_the_correction_bias_moves_by_its_rate(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    source = tiny("deepseek_v3")
    o = few_steps(balance="bias", bias_rate=0.25, steps=1, eval_every=1)
    train_router(source, tokens, o, folder=tmp_path)
    values = torch.load(tmp_path / "state-0000001.0.pt", weights_only=True)["values"]
    (name,) = (n for n in values if n.endswith("e_score_correction_bias"))
    moved = set((values[name] * 4).round(decimals=5).tolist())
    assert moved <= {-1.0, 0.0, 1.0} and len(moved) > 1
    assert bias_step(torch.tensor([1.0, 3.0]), 0.25).tolist() == [0.25, -0.25]


def test_domains_find_their_experts(tiny: Any, tokens: TokenSet) -> None:
    """Routers learn which expert is whose; in the order of names, not of domains (the control)."""
    source = tiny("mixtral", num_local_experts=2)
    named = NamedSource(source, ["b", "a"])
    o = few_steps(objective="domain", steps=30, lr=3e-2, eval_every=10, z_loss=0.0)
    found = report(train_router(named, tokens, o))
    assert found["experts_of_domains"] == {"a": 1, "b": 0}
    assert found["best"]["loss"] < 0.95 * found["start"]["loss"]
    assert report(train_router(source, tokens, o))["experts_of_domains"] == {"a": 0, "b": 1}


class NamedSource:
    """A checkpoint whose config names its experts."""

    def __init__(self, source: mc.Checkpoint, names: list[str]) -> None:
        self._source, self.config = source, {**source.config, "expert_names": names}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def test_labels() -> None:
    names = {"expert_names": ["base", "py", "py", None]}
    assert experts_of_domains(["base"], names, 4) == {"base": 0}
    with pytest.raises(mc.OptionError, match="named like py, de"):
        experts_of_domains(["py", "de"], names, 4)
    with pytest.raises(mc.OptionError, match="2 domains and 4 experts"):
        experts_of_domains(["py", "de"], {}, 4)
    with pytest.raises(mc.OptionError, match="needs text by domain"):
        experts_of_domains(["text"], names, 4)


@pytest.mark.parametrize(
    ("family", "how", "changes", "said"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, {}, "gets no gradient: route to 2 experts"),
        ("mixtral", {}, {"balance": "bias"}, "does not have: use switch"),
        ("mixtral", {}, {"objective": "distill"}, "needs a teacher"),
        ("mixtral", {}, {"train": "router+experts=9"}, "there are 6"),
        ("mixtral", {}, {"objective": "domain"}, "2 domains and 6 experts"),
    ],
)
def test_refused(
    tiny: Any, tokens: TokenSet, family: str, how: Any, changes: Any, said: str
) -> None:
    with pytest.raises(mc.OptionError) as caught:
        train_router(tiny(family, **how), tokens, few_steps(**changes))
    assert said in str(caught.value)


def test_text_that_is_trained_on_is_not_held_out(tiny: Any, tokens: TokenSet) -> None:
    source, file = tiny("mixtral"), DataFile("a.txt", "0" * 64, 1)
    same = replace(tokens, files=((file,), ()))
    with pytest.raises(mc.OptionError, match="would flatter"):
        train_router(source, same, few_steps(), held_out=same)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "rl"}, "objective (rl)"),
        ({"train": "router+lora"}, "train (router+lora)"),
        ({"steps": 0, "lr": -1.0}, "steps (0)"),
        ({"dtype": "float16"}, "dtype (float16)"),
        ({"patience": 0}, "patience (0)"),
    ],
)
def test_options_that_cannot_be_meant(changes: Any, said: str) -> None:
    with pytest.raises(mc.OptionError) as caught:
        few_steps(**changes)
    assert said in str(caught.value)


def test_routers_of_a_quantised_model(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """FP8 experts keep their bytes; they cannot train themselves."""
    plain = tiny("deepseek_v3")
    stored: dict[str, torch.Tensor] = {}
    for name in plain.tensors:
        stored[name] = value = plain.read(name)
        if ".experts." in name:
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            blocks = [-(-n // 16) for n in value.shape]
            stored[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
    folder = tmp_path / "fp8"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (folder / "config.json").write_text(json.dumps({**plain.config, **config}))
    source = mc.Checkpoint.open(folder)
    written = mc.write(train_router(source, tokens, few_steps(lr=1e-2)), tmp_path / "out")
    for name in (n for n in source.tensors if not n.endswith("gate.weight")):
        assert raw(written, name) == raw(source, name)
    with pytest.raises(mc.UnsupportedError, match="is stored as F8_E4M3"):
        train_router(source, tokens, few_steps(train="router+experts=1"))
