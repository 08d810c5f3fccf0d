"""What travels with a model of the Hub: history, receipts, statistics, adapters; and no network.

pytest tests/checkpoint/test_hub_lifecycle.py
"""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import Hub
from huggingface_hub import constants
from safetensors.torch import save_file

import moe_compose as mc
from moe_compose.composition.kept import STATS_PLACE
from moe_compose.errors import CheckpointError
from moe_compose.reporting.inspect import inspect
from moe_compose.reporting.report import html_report
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.history import document
from moe_compose.surgery.lora import Adapter

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stories260K"


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture
def moe(hub: Hub, tmp_path: Path) -> Hub:
    """An upcycled model on the Hub, with a receipt."""
    plan = mc.upcycle(mc.Checkpoint.open(MODEL), mc.UpcycleOptions(num_experts=2))
    mc.write(plan, tmp_path / "moe")
    (tmp_path / "moe" / "validation.json").write_text(json.dumps({"ok": True, "receipt": None}))
    hub.files = files_of(tmp_path / "moe")
    return hub


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


@pytest.mark.parametrize("headers_only", [True, False])
def test_history_and_receipt_are_seen_from_afar(moe: Hub, headers_only: bool) -> None:
    found = inspect(mc.Checkpoint.open("org/toy@v1", headers_only=headers_only))
    assert [r["operation"] for r in found.history] == ["upcycle"]
    assert found.validation is not None and found.validation["ok"]
    assert "Surgery history" in html_report(mc.Checkpoint.open("org/toy", headers_only=True))
    assert headers_only is ("model.safetensors" not in moe.sent or "tokenizer.json" not in moe.sent)


def test_what_is_not_there_is_not_asked_for(moe: Hub) -> None:
    source = mc.Checkpoint.open("org/toy", headers_only=True)
    moe.sent.clear()
    assert document(source, "pruning.json") is None
    assert not moe.sent


def test_statistics_in_a_folder_come_when_they_are_wanted(moe: Hub) -> None:
    moe.files[STATS_PLACE] = b"statistics"
    for headers_only in (True, False):
        source = mc.Checkpoint.open("org/toy", headers_only=headers_only)
        path = document(source, STATS_PLACE)
        assert path is not None and path.read_bytes() == b"statistics"
    del moe.files[STATS_PLACE]
    assert document(mc.Checkpoint.open("org/toy@v1"), "moe_compose/other") is None


def test_without_a_network_what_was_downloaded_is_enough(
    moe: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_history = inspect(mc.Checkpoint.open("org/toy"))
    offline(monkeypatch)
    for headers_only in (True, False):
        found = mc.Checkpoint.open("org/toy", headers_only=headers_only)
        assert inspect(found).history == with_history.history
        assert document(found, STATS_PLACE) is None


@pytest.mark.parametrize("headers_only", [True, False])
def test_without_a_network_and_a_download(
    moe: Hub, monkeypatch: pytest.MonkeyPatch, headers_only: bool
) -> None:
    offline(monkeypatch)
    with pytest.raises(
        CheckpointError, match="org/toy@v1 is no folder here and not in the Hub's cache"
    ):
        mc.Checkpoint.open("org/toy@v1", headers_only=headers_only)


def test_an_adapter_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.mlp.up_proj"
    sides = {f"{module}.lora_A.weight": (2, 64), f"{module}.lora_B.weight": (172, 2)}
    (tmp_path / "lora").mkdir()
    save_file(
        {name: torch.ones(shape) for name, shape in sides.items()},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    (tmp_path / "lora" / "adapter_config.json").write_text(config)
    hub.files = files_of(tmp_path / "lora")
    behind = Donor.parse(f"{MODEL}+org/toy@v1")
    assert behind.adapter is not None and behind.label == "stories260K+org/toy@v1"
    alone = Donor.parse("org/toy")
    assert alone.adapter is not None and (alone.label, alone.source) == ("org/toy", None)
    assert alone.adapter.digest() == Adapter.open(tmp_path / "lora").digest()
    for text, said in [
        (f"{MODEL}+org/nothing", "no model org/nothing on the Hub"),
        ("org/nothing", "no model org/nothing on the Hub"),
        ("org/toy#3", r"org/toy holds no config\.json"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            Donor.parse(text)
