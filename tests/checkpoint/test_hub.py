"""Models of the Hub, against a small server on this machine that speaks a part of its API.

pytest tests/checkpoint/test_hub.py
"""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, SINGLE, Hub
from huggingface_hub import constants
from safetensors.torch import save_file

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def file_of(tensors: dict[str, torch.Tensor], tmp_path: Path) -> bytes:
    save_file(tensors, tmp_path / "x.safetensors")
    return (tmp_path / "x.safetensors").read_bytes()


BIG = {f"layer.{i}.weight": torch.full((64, 128), float(i)) for i in range(64)}
CONFIG = b'{"model_type": "toy"}'


@pytest.fixture
def sharded(hub: Hub, tmp_path: Path) -> Hub:
    """Two shards of a megabyte each, and all that such repositories hold besides."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(BIG.items())[:32]), dict(list(BIG.items())[32:])]
    weight_map = {t: n for n, half in zip(names, halves, strict=True) for t in half}
    hub.files = {
        "config.json": CONFIG,
        INDEX: json.dumps({"weight_map": weight_map}).encode(),
        **{n: file_of(half, tmp_path) for n, half in zip(names, halves, strict=True)},
        **{n: n.encode() for n in ("tokenizer.json", "tokenizer.model", "merges.txt", "README.md")},
        **{n: n.encode() for n in ("LICENSE.txt", "chat_template.jinja")},
        "additional_chat_templates/rag.jinja": b"rag",
        "consolidated.safetensors": b"again",
        "original/consolidated.00.pth": b"pickle",
        "original/params.json": b"{}",
        "onnx/model.safetensors": b"other",
        "pytorch_model.bin": b"pickle",
        "modeling_toy.py": b"raise SystemExit",
        ".gitattributes": b"",
    }
    return hub


def test_headers_only_fetches_kilobytes(sharded: Hub) -> None:
    checkpoint = Checkpoint.open("org/toy", headers_only=True)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == dict.fromkeys(BIG, (64, 128))
    assert checkpoint.config == {"model_type": "toy"}
    assert checkpoint.total_bytes == 64 * 64 * 128 * 4
    assert (checkpoint.label, checkpoint.revision, checkpoint.path) == ("org/toy", COMMIT, None)
    assert (checkpoint.files, checkpoint.weight_files) == ({}, ())
    weights = {name: n for name, n in sharded.sent.items() if name.endswith(".safetensors")}
    assert set(weights) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert max(weights.values()) <= 64 << 10
    assert "tokenizer.json" not in sharded.sent


def test_headers_only_has_no_values(sharded: Hub) -> None:
    checkpoint = Checkpoint.open("org/toy", headers_only=True)
    assert checkpoint.extents("layer.0.weight") is None
    for use in (checkpoint.read, checkpoint.stream):
        with pytest.raises(CheckpointError, match=r"(?s)not downloaded.*without headers_only"):
            use("layer.0.weight")


def test_a_long_header_takes_a_second_request(hub: Hub, tmp_path: Path) -> None:
    many = {f"{'long.' * 20}{i}": torch.full((1,), i) for i in range(1000)}
    hub.files = {"config.json": CONFIG, SINGLE: file_of(many, tmp_path)}
    assert set(Checkpoint.open("org/toy", headers_only=True).tensors) == set(many)
    length = int.from_bytes(hub.files[SINGLE][:8], "little")
    assert 64 << 10 < hub.sent[SINGLE] == 8 + length


def test_download_is_a_folder_without_pickles_code_and_copies(sharded: Hub) -> None:
    checkpoint = Checkpoint.open("org/toy@v1")
    assert (checkpoint.label, checkpoint.revision) == ("org/toy@v1", COMMIT)
    assert checkpoint.path is not None
    for name, tensor in BIG.items():
        assert torch.equal(checkpoint.read(name), tensor)
    along = ["LICENSE.txt", "README.md", "additional_chat_templates/rag.jinja"]
    along += ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
    assert list(checkpoint.files) == along
    there = {p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*.*")}
    assert there == {*along, "config.json", INDEX, *(p.name for p in checkpoint.weight_files)}


def test_both_ways_have_the_same_digest(sharded: Hub) -> None:
    whole = Checkpoint.open("org/toy", revision="v1")
    headers = Checkpoint.open("org/toy", revision="v1", headers_only=True)
    assert whole.digest() == headers.digest()
    assert list(whole.tensors) == list(headers.tensors)


def test_what_was_downloaded_opens_without_the_hub(
    sharded: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = Checkpoint.open("org/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert Checkpoint.open("org/toy").digest() == online.digest()


def test_a_server_that_ignores_ranges(hub: Hub, tmp_path: Path) -> None:
    """Its answers begin with the file: the first bytes can be used, later ones can't."""
    hub.files = {"config.json": CONFIG, SINGLE: file_of(BIG, tmp_path)}
    hub.ignores_ranges = True
    assert len(Checkpoint.open("org/toy", headers_only=True).tensors) == 64
    many = {f"{'long.' * 20}{i}": torch.full((1,), i) for i in range(1000)}
    hub.files[SINGLE] = file_of(many, tmp_path)
    with pytest.raises(CheckpointError, match=f"org/toy/{SINGLE}: the server sent 0 of"):
        Checkpoint.open("org/toy", headers_only=True)


@pytest.mark.parametrize(
    ("lie", "message"), [(1, "1 bytes at the end"), (-1, "truncated: the tensors take")]
)
def test_remote_headers_are_held_to_the_size_of_the_file(
    hub: Hub, tmp_path: Path, lie: int, message: str
) -> None:
    hub.files = {"config.json": CONFIG, SINGLE: file_of(BIG, tmp_path)}
    hub.lies_about_size = lie
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("org/toy", headers_only=True)


@pytest.mark.parametrize("headers_only", [True, False])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, r"(?is)org/toy holds.*pickle"),
        ({"config.json": CONFIG, SINGLE: b"12345678{"}, rf"org/toy/{SINGLE}: the header"),
        ({"config.json": b"{", SINGLE: b"\2" + bytes(7) + b"{}"}, r"org/toy/config\.json: not"),
        ({SINGLE: b"\2" + bytes(7) + b"{}"}, r"org/toy holds no config\.json"),
        ({"config.json": b"", SINGLE: b"\2" + bytes(7) + b"{}"}, r"config\.json: not valid JSON"),
        (
            {"config.json": CONFIG, INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'},
            r"same folder",
        ),
    ],
)
def test_the_rules_of_folders_hold_for_the_hub(
    hub: Hub, files: dict[str, bytes], message: str, headers_only: bool
) -> None:
    hub.files = files
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("org/toy", headers_only=headers_only)


@pytest.mark.parametrize("headers_only", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/nothing", r"(?s)no model org/nothing on the Hub.*hf auth login"),
        ("org/gated", r"(?s)org/gated is gated.*Accept them at https://huggingface.co/org/gated"),
        ("org/toy@nope", r"(?s)org/toy has no revision 'nope'.*commits"),
        ("org/--toy", r"not a Hub id \('org/--toy'\)"),
    ],
)
def test_errors_of_the_hub_have_a_next_step(
    sharded: Hub, name: str, message: str, headers_only: bool
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(name, headers_only=headers_only)


@pytest.mark.parametrize("headers_only", [True, False])
def test_out_of_reach(hub: Hub, monkeypatch: pytest.MonkeyPatch, headers_only: bool) -> None:
    hub.files = {"config.json": CONFIG}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError,
        match=r"(?s)no folder org/toy here, and the Hub cannot be read.*Check the connection",
    ):
        Checkpoint.open("org/toy", headers_only=headers_only)
