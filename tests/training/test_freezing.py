"""`freeze`: which parameters and rows move in each stage, in a plain loop and in the Trainer.

pytest tests/training/test_freezing.py
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

import moe_compose as mc
from moe_compose.training import freeze

PAIR = {"num_experts": 2, "num_experts_per_tok": 2}
GPT = {"num_local_experts": 2, "num_experts_per_tok": 2}


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def moved(before: dict[str, Tensor], model: Any) -> dict[str, list[int]]:
    """Parameter → rows that are not what they were."""
    rows = {
        n: [i for i in range(len(p)) if not torch.equal(p[i], before[n][i])]
        for n, p in model.named_parameters()
    }
    return {n: r for n, r in rows.items() if r}


def train(model: Any, kept: Any, *, put_back: bool = True) -> dict[str, list[int]]:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        optimizer.step()
        if put_back:
            kept.after_step()
    return moved(before, model)


@pytest.mark.parametrize(("family", "how"), [("flex_olmo", PAIR), ("gpt_oss", GPT)])
@pytest.mark.parametrize("stage", ["mid", "sft", "rl"])
def test_stages(family: str, how: dict[str, int], stage: str) -> None:
    model = tiny_model(family, **how)
    found = train(model, freeze(model, stage))
    own = {n: rows for n, rows in found.items() if "expert" in n or ".gate." in n or "router" in n}
    assert own and all(rows == [1] for rows in own.values())
    shared = found.keys() - own.keys()
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    if stage == "mid":
        assert not shared
    elif stage == "sft":
        assert shared == ends
    else:
        assert shared > ends and len(found) == len(list(model.named_parameters()))


def test_weight_decay_moves_what_is_not_put_back() -> None:
    """The control."""
    model = tiny_model("flex_olmo", **PAIR)
    found = train(model, freeze(model, "mid"), put_back=False)
    assert found["model.layers.0.mlp.experts.down_proj"] == [0, 1]


def test_a_plan_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "freeze.json"
    path.write_text(json.dumps({"anchors": [1], "stages": {"norms": ["norm"]}}))
    model = tiny_model("flex_olmo", **PAIR)
    found = train(model, freeze(model, "norms", path))
    assert found["model.layers.1.mlp.gate.weight"] == [0]
    assert "model.norm.weight" in found and "lm_head.weight" not in found
    with pytest.raises(mc.OptionError, match=r"stage \(mid\) is none of norms"):
        freeze(model, "mid", path)
    path.write_text("{}")
    with pytest.raises(mc.OptionError, match="does not say what to freeze"):
        freeze(model, "mid", path)
    with pytest.raises(mc.OptionError, match="must be below 2"):
        freeze(model, "mid", {"anchors": [2], "stages": {"mid": []}})
    with pytest.raises(mc.UnsupportedError, match="no mixture of experts"):
        freeze(tiny_model("llama"), "mid")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="Trainer needs accelerate")
@pytest.mark.filterwarnings("ignore")
def test_with_the_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_model("flex_olmo", **PAIR)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        weight_decay=0.1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=1,
        disable_tqdm=True,
    )
    data = [{n: t[0] for n, t in batch(i).items()} for i in range(6)]
    Trainer(model, arguments, train_dataset=data, callbacks=[freeze(model, "mid")]).train()
    found = moved(before, model)
    assert len(found) == 3 * 3 and all(rows == [1] for rows in found.values())
