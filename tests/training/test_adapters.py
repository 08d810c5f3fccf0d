"""Adapters beside routers: merged as peft merges them, on the right experts, or kept as peft's own.

pytest tests/training/test_adapters.py
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import few_steps
from pruned import raw
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.training import train_router
from moe_compose.training.setup import intent

pytest.importorskip("peft")

from peft import PeftModel

#: peft asks transformers for a property that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SPARSE = {"decoder_sparse_step": 1}
IDS = torch.arange(3, 35)[None]


def options(**changes: Any) -> Any:
    few = {"train": "lora-all", "lr": 1e-2, "lora_rank": 2, "lora_alpha": 6}
    return few_steps(**{**few, **changes})


def loaded(path: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("train", ["lora-attention", "lora-experts", "lora-all"])
def test_merged_or_kept(
    tiny: Any, tokens: TokenSet, tmp_path: Path, family: str, train: str
) -> None:
    """Experts one by one on disk, and stacked and transposed: adapters that peft loads compute what
    the merged checkpoint does, and peft merges them to the same weights; without them (the
    control), it is another model.
    """
    source, o = tiny(family), options(train=train)
    merged = mc.write(train_router(source, tokens, o), tmp_path / "merged")
    folder = tmp_path / "adapters"
    plan = train_router(source, tokens, o, adapter_out=folder)
    assert any("needs the adapters" in note for note in plan.notes)
    routers = mc.write(plan, tmp_path / "routers")
    assert all("gate" in n or "router" in n for n in plan.sources["changed"].tensors)
    assert plan.reports["training.json"]["best"]["step"] > 0
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 6

    wanted = logits(loaded(merged.path))
    plain = logits(loaded(routers.path))
    model = PeftModel.from_pretrained(loaded(routers.path), str(folder))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert float((plain - wanted).abs().max()) > 1e-2, "the control"
    theirs = model.merge_and_unload().state_dict()
    for name, ours in loaded(merged.path).state_dict().items():
        assert float((theirs[name] - ours).abs().max()) <= 1e-6, name


def test_every_expert_gets_its_own(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """B A of expert e is what expert e's matrices on disk changed by; not e + 1's (the control)."""
    source, o = tiny("qwen3_moe", **SPARSE), options(train="lora-experts", steps=12)
    merged = train_router(source, tokens, o)
    train_router(source, tokens, o, adapter_out=tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    at = "model.layers.1.mlp.experts"
    pairs = {n: t for n, t in stored.items() if at in n}
    a, b = (  # of gate and up, which peft wraps last or first
        next(t for n, t in pairs.items() if f"lora_{side}" in n and t.shape[dim] == size)
        for side, dim, size in (("A", 1, 32), ("B", 0, 48))
    )
    experts, rank = 6, 2

    def change(e: int) -> torch.Tensor:
        return 3 * (b.reshape(48, rank, experts)[:, :, e] @ a.reshape(experts, rank, 32)[e])

    def moved(e: int) -> torch.Tensor:
        names = [f"{at}.{e}.{p}_proj.weight" for p in ("gate", "up")]
        return torch.cat([merged.read(n) - source.read(n) for n in names])

    lively = [e for e in range(experts) if float(moved(e).abs().max()) > 1e-3]  # some get no token
    assert len(lively) > 2
    for e in range(experts):
        assert float((moved(e) - change(e)).abs().max()) <= 1e-6
    for e, other in pairwise(lively):
        assert float((moved(e) - change(other)).abs().max()) > 1e-3


def test_what_is_frozen_keeps_its_bytes(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    source = tiny("granitemoe", dtype=torch.bfloat16)
    o = options(train="lora-attention", dtype="bfloat16", weight_decay=0.5)
    plan = train_router(source, tokens, o)
    written = mc.write(plan, tmp_path / "out")
    changed = [n for n in source.tensors if raw(written, n) != raw(source, n)]
    assert changed and all("router" in n or "self_attn" in n for n in changed)
    assert any("self_attn.q_proj" in n for n in changed)
    assert {written.tensors[n].dtype for n in changed} == {"BF16"}
    found = plan.reports["training.json"]
    assert found["best"]["loss"] < found["start"]["loss"]
    assert found["trained"]["parameters"] == intent(source, tokens, None, o, None).trained


def test_the_start_is_kept_where_nothing_is_better(
    tiny: Any, tokens: TokenSet, tmp_path: Path
) -> None:
    """Distilled from itself: nothing can be better."""
    source = tiny("mixtral")
    plan = train_router(source, tokens, options(objective="distill"), teacher=source)
    assert plan.reports["training.json"]["best"]["step"] == 0
    written = mc.write(plan, tmp_path / "out")
    assert all(raw(written, n) == raw(source, n) for n in source.tensors)


def test_resume(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """Adapters and their moments are part of the state; another rank is another run."""
    source, o = tiny("qwen3_moe"), options(steps=5)

    def run(place: str, how: Any = o, stop_at: int = 0, **more: Any) -> mc.Plan:
        def tell(progress: Any) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        folder = tmp_path / place
        return train_router(
            source, tokens, how, folder=folder, progress=tell if stop_at else None, **more
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=3)
    with pytest.raises(mc.WriteError, match="another run"):
        run("cut", options(steps=5, lora_rank=3), resume=True)
    torch.manual_seed(7)  # no global generator has a say
    assert run("cut", resume=True).digest() == whole.digest()


@pytest.mark.parametrize(
    ("family", "changes", "error", "said"),
    [
        ("dbrx", {}, mc.UnsupportedError, "one adapter together"),
        ("qwen3_moe", {"shard": True}, mc.OptionError, "shard has no meaning with adapters"),
        ("qwen3_moe", {"objective": "layer"}, mc.OptionError, "trains routers only"),
    ],
)
def test_refused(
    tiny: Any, tokens: TokenSet, family: str, changes: Any, error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        train_router(tiny(family), tokens, options(**changes))


def test_places_for_adapters(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    with pytest.raises(mc.OptionError, match="no adapters are trained"):
        train_router(source, tokens, few_steps(), adapter_out=tmp_path / "new")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(mc.OptionError, match="new or empty"):
        train_router(source, tokens, options(), adapter_out=tmp_path)


def test_without_peft(tiny: Any, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_compose.training.adapters.find_spec", lambda name: None)
    with pytest.raises(mc.UnsupportedError, match="peft, which is not installed"):
        train_router(tiny("qwen3_moe"), tokens, options())
