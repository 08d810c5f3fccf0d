"""Folders as checkpoints: what is read, compared with safetensors, and every refused folder.

pytest tests/checkpoint/test_reader.py
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_compose.checkpoint import reader
from moe_compose.checkpoint.header import encode_header
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import DTYPE_BITS, TORCH_DTYPES, TensorInfo, TensorSource
from moe_compose.errors import CheckpointError, OptionError

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of random bytes for each dtype of torch, and the odd shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, torch_name in TORCH_DTYPES.items():
        raw = torch.randint(0, 256, (6 * DTYPE_BITS[name] // 8,), generator=generator)
        raw = raw % 2 if name == "BOOL" else raw
        tensors[name] = raw.to(torch.uint8).view(getattr(torch, torch_name)).reshape(2, 3)
    empty = {"none": torch.empty(0), "none of many": torch.empty(3, 0, 2, dtype=torch.bfloat16)}
    return {**tensors, **empty, "scalar": torch.tensor(3.5), "a/b.c d\u00e9": torch.ones(1, 1)}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat_a, flat_b = a.contiguous().flatten(), b.contiguous().flatten()
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shards(folder: Path, *shards: dict[str, torch.Tensor], index: bool = True) -> list[str]:
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    if index:
        write_index(folder, {t: n for n, ts in zip(names, shards, strict=True) for t in ts})
    return names


def refused(folder: str | Path, *messages: str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder, **options)
    for message in messages:
        assert message in str(error.value)
    assert str(Path(__file__).parents[2]) not in str(error.value)
    return error.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "toy", "hidden_size": 3}')
    return path


ONE, TWO = {"a": torch.arange(4.0)}, {"b": torch.ones(2, dtype=torch.bfloat16)}


def test_every_dtype_reads_as_safetensors_reads_it(folder: Path) -> None:
    save_file(every_dtype(), folder / SINGLE)
    checkpoint: TensorSource = Checkpoint.open(folder)
    expected = load_file(folder / SINGLE)
    assert set(checkpoint.tensors) == set(expected)
    with safe_open(folder / SINGLE, "pt") as file:
        for name, info in checkpoint.tensors.items():
            assert info.dtype == file.get_slice(name).get_dtype()
            assert list(info.shape) == file.get_slice(name).get_shape()
    for name, tensor in expected.items():
        assert same_bytes(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].nbytes == tensor.nbytes


def test_stream_gives_the_values_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(every_dtype(), folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 19)  # a multiple of one element size only
    for name, info in checkpoint.tensors.items():
        pieces = list(checkpoint.stream(name))
        assert all(p.ndim == 1 and p.nbytes <= 19 for p in pieces)
        if info.numel == 0:
            assert pieces == []
        else:
            assert same_bytes(torch.cat(pieces).reshape(info.shape), checkpoint.read(name))
    assert len(list(checkpoint.stream("F64"))) == 3


def test_extents_say_where_the_bytes_lie(folder: Path) -> None:
    write_shards(folder, every_dtype(), {"last": torch.arange(5)})
    checkpoint = Checkpoint.open(folder)
    for name, info in checkpoint.tensors.items():
        (extent,) = checkpoint.extents(name) or ()
        content = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        assert len(content) == info.nbytes
        assert content == bytes(checkpoint.read(name).flatten().view(torch.uint8).tolist())


def test_members_of_a_sharded_checkpoint(folder: Path) -> None:
    shards = write_shards(folder, *({f"t{i}": torch.full((2,), i)} for i in range(11)))
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.label == "tiny"
    assert checkpoint.path == folder
    assert checkpoint.revision is None
    assert [path.name for path in checkpoint.weight_files] == shards
    assert list(checkpoint.tensors) == [f"t{i}" for i in range(11)]
    assert checkpoint.total_bytes == 11 * 16
    assert checkpoint.config["hidden_size"] == 3
    assert repr(checkpoint) == "Checkpoint('tiny', 11 tensors, 176 bytes)"
    with pytest.raises(TypeError):
        checkpoint.config["hidden_size"] = 4  # type: ignore[index]
    with pytest.raises(TypeError):
        checkpoint.tensors["x"] = checkpoint.tensors["t0"]  # type: ignore[index]


def test_files_are_in_natural_order_and_tensors_in_order_of_their_data(folder: Path) -> None:
    for i in (10, 9, 1):
        save_file({f"z{i}": torch.ones(1), f"a{i}": torch.ones(2)}, folder / f"part{i}.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert [p.name for p in checkpoint.weight_files] == [f"part{i}.safetensors" for i in (1, 9, 10)]
    offsets = [(e.path.name, e.offset) for n in checkpoint.tensors for e in checkpoint.extents(n)]
    assert offsets == sorted(offsets, key=lambda o: (len(o[0]), o))


def test_digest_is_of_the_content_and_not_of_the_files(tmp_path: Path) -> None:
    def digest(config: str, *shards: dict[str, torch.Tensor]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text(config)
        write_shards(folder, *shards)
        return Checkpoint.open(folder).digest()

    base = digest('{"x": 1, "y": [2.5]}', ONE, TWO)
    assert base == digest('{ "y": [2.5], "x": 1 }', {**TWO, **ONE})
    assert base == digest('{"x": 1, "y": [2.5]}', {"a": torch.zeros(4)}, TWO)
    assert base != digest('{"x": 1, "y": [2.6]}', ONE, TWO)
    assert base != digest('{"x": 1, "y": [2.5]}', ONE)
    assert base != digest('{"x": 1, "y": [2.5]}', {"a": torch.arange(4.0).reshape(2, 2)}, TWO)
    assert base != digest('{"x": 1, "y": [2.5]}', {"a": torch.arange(4)}, TWO)


def test_digest_stays_what_it_was(folder: Path) -> None:
    """Stored digests name plans; a change here makes every unfinished write unresumable."""
    save_file(ONE, folder / SINGLE)
    known = b'{"config":{"hidden_size":3,"model_type":"toy"},"tensors":{"a":["F32",[4]]}}'
    assert Checkpoint.open(folder).digest() == hashlib.sha256(known).hexdigest()


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 3), ("F6_E2M3", None), ("F99", 5)])
def test_dtypes_foreign_to_torch_have_extents_and_no_values(
    folder: Path, dtype: str, nbytes: int | None
) -> None:
    shape = (2, 3) if dtype == "F4" else (4,)
    info = TensorInfo("w", dtype, shape, nbytes or 3)
    data = bytes(range(info.nbytes))
    (folder / SINGLE).write_bytes(encode_header([info], {}) + data)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors["w"] == info
    (extent,) = checkpoint.extents("w") or ()
    assert extent.path.read_bytes()[extent.offset :] == data
    for use in (checkpoint.read, checkpoint.stream):
        with pytest.raises(CheckpointError, match="only be copied as bytes"):
            use("w")


def test_an_unknown_name_is_told_with_its_neighbours(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(1)}, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    for use in (checkpoint.read, checkpoint.stream, checkpoint.extents):
        with pytest.raises(CheckpointError, match=r"Did you mean 'model\.norm\.weight'"):
            use("model.norm.weights")


def test_files_that_travel_along(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "original").mkdir()
    along = ["README.md", "LICENSE", "tokenizer.json", "tokenizer.model", "merges.txt"]
    along += ["additional_chat_templates/rag.jinja", "chat_template.jinja", "vocab.json"]
    left = ["a.bin", "b.PT", "c.pth", "d.ckpt", "e.gguf", "f.onnx", "g.h5", "h.msgpack", "i.part"]
    left += [".gitattributes", "validation.json", "pytorch_model.bin.index.json", "original/x.txt"]
    left += ["additional_chat_templates/.hidden"]
    for name in along + left:
        (folder / name).write_text("x")
    (folder / "dangling").symlink_to("nowhere")
    files = Checkpoint.open(folder).files
    assert list(files) == sorted(along)
    assert all(path == folder / name for name, path in files.items())


def test_links_are_followed_as_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    save_file(ONE, blobs / "1234")
    (folder / SINGLE).symlink_to("../blobs/1234")
    (folder / "config.json").rename(blobs / "5678")
    (folder / "config.json").symlink_to("../blobs/5678")
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.read("a"), ONE["a"])
    assert checkpoint.weight_files == (folder / SINGLE,)


def test_the_index_wins_over_a_single_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(folder, ONE, TWO)
    save_file({"other": torch.ones(1)}, folder / SINGLE)
    with caplog.at_level(logging.WARNING, "moe_compose"):
        checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert caplog.messages == [f"tiny: '{SINGLE}' left out: not in {INDEX}"]


def test_the_single_file_wins_over_others(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(ONE, folder / SINGLE)
    save_file(ONE, folder / "consolidated.safetensors")
    assert [path.name for path in Checkpoint.open(folder).weight_files] == [SINGLE]
    assert "'consolidated.safetensors' left out" in caplog.text


def test_shards_without_an_index_and_a_file_of_another_name(folder: Path) -> None:
    write_shards(folder, ONE, TWO, index=False)
    assert list(Checkpoint.open(folder).tensors) == ["a", "b"]
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(ONE, folder / "weights.safetensors")
    assert list(Checkpoint.open(folder).tensors) == ["a"]


def test_relative_paths_survive_a_change_of_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file(ONE, folder / SINGLE)
    monkeypatch.chdir(folder)
    checkpoint = Checkpoint.open(".")
    assert checkpoint.label == "tiny"
    monkeypatch.chdir(tmp_path)
    assert torch.equal(checkpoint.read("a"), ONE["a"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoint.open("~/tiny").label == "tiny"


def test_a_folder_is_preferred_to_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(ONE, folder / SINGLE)
    monkeypatch.chdir(folder.parents[1])
    assert Checkpoint.open(f"{folder.parent.name}/tiny").path == folder


@pytest.mark.parametrize("name", ["./org/name", "../name", "/org/name", "~/x", "org/name/", "a\\b"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name: str) -> None:
    refused(name, "there is no folder")
    refused(Path("org/name"), "there is no folder")


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "org/na me", "org/name@", "or\0g/name"])
def test_what_is_neither_path_nor_hub_id(name: str) -> None:
    refused(name, "neither a folder nor a Hub id", "org/name@revision")


def test_revisions_are_for_the_hub(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    with pytest.raises(OptionError, match="no revisions"):
        Checkpoint.open(folder, revision="main")
    with pytest.raises(OptionError, match="two revisions"):
        Checkpoint.open("org/name@v1", revision="v2")


def test_a_file_is_no_folder(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    with pytest.raises(CheckpointError, match="a checkpoint is a folder"):
        Checkpoint.open(folder / SINGLE)


def cut(folder: Path) -> None:
    os.truncate(folder / SINGLE, 100)


FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda f: (f / "config.json").unlink(), ["no weights", "among 0 files"]),
    "no weights": (lambda f: None, ["tiny holds no weights", "among 1 files"]),
    "no config": (
        lambda f: (save_file(ONE, f / SINGLE), (f / "config.json").unlink()),
        ["tiny holds no config.json"],
    ),
    "config is a folder": (
        lambda f: (
            save_file(ONE, f / SINGLE),
            (f / "config.json").unlink(),
            (f / "config.json").mkdir(),
        ),
        ["tiny holds no config.json"],
    ),
    "pickles": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        ["'pytorch_model.bin'", "never opened", "save_pretrained"],
    ),
    "unfinished": (
        lambda f: (f / "model-00001-of-00002.safetensors.part").write_bytes(b""),
        ["unfinished write", "--resume"],
    ),
    "unfinished, some done": (
        lambda f: (
            write_shards(f, ONE, TWO, index=False)
            and (f / "model-00002-of-00002.safetensors").rename(f / "x.safetensors.part")
        ),
        ["unfinished write ('x.safetensors.part')"],
    ),
    "unfinished, by the writer's note": (
        lambda f: (save_file(ONE, f / SINGLE), (f / ".moe-compose-write.json").write_text("{}")),
        ["unfinished write ('.moe-compose-write.json')"],
    ),
    "shard of no index missing": (
        lambda f: (
            write_shards(f, ONE, TWO, index=False)
            and (f / "model-00001-of-00002.safetensors").unlink()
        ),
        ["1 of 2 files 'model'-*-of-00002.safetensors are there"],
    ),
    "shards of the index missing": (
        lambda f: (
            save_file(ONE, f / "x.safetensors"),
            write_index(f, {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors"}),
        ),
        ["'y.safetensors' is in model.safetensors.index.json only", "'z.safetensors' is in"],
    ),
    "index without files": (lambda f: write_index(f, {}), ["no weights"]),
    "index is damaged": (
        lambda f: (f / INDEX).write_text('{"weight_map": {'),
        [f"tiny/{INDEX}: not valid JSON", "line 1, column 17"],
    ),
    "index leaves the folder": (
        lambda f: (
            save_file(ONE, f.parent / "x.safetensors"),
            write_index(f, {"a": "../x.safetensors"}),
        ),
        ["same folder ('../x.safetensors', for 'a')"],
    ),
    "tensor not in its shard": (
        lambda f: (save_file(ONE, f / SINGLE), write_index(f, {"a": SINGLE, "b": SINGLE})),
        ["tensor 'b' is not in model.safetensors, the index says so"],
    ),
    "tensor not in the index": (
        lambda f: (save_file({**ONE, **TWO}, f / SINGLE), write_index(f, {"a": SINGLE})),
        ["tensor 'b' is in model.safetensors, the index does not say so"],
    ),
    "tensor in another shard": (
        lambda f: (
            save_file(ONE, f / "x.safetensors"),
            save_file(TWO, f / "y.safetensors"),
            write_index(f, {"a": "y.safetensors", "b": "x.safetensors"}),
        ),
        ["tensor 'a' is in x.safetensors, the", "tensor 'a' is not in y.safetensors, the"],
    ),
    "tensor in two files": (
        lambda f: (
            save_file(ONE, f / "x.safetensors"),
            save_file({**ONE, **TWO}, f / "y.safetensors"),
        ),
        ["tensor 'a' is in x.safetensors and in y.safetensors"],
    ),
    "truncated": (
        lambda f: (save_file({"a": torch.ones(99)}, f / SINGLE), cut(f)),
        [f"tiny/{SINGLE}: not a valid", "truncated: the tensors take 396 bytes"],
    ),
    "two damaged files": (
        lambda f: (
            (f / "x.safetensors").write_bytes(b"1"),
            (f / "y.safetensors").write_bytes(b"version https://git-lfs"),
        ),
        ["tiny: damaged files", "tiny/x.safetensors: ", "tiny/y.safetensors is a git-lfs pointer"],
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_refused_folders(folder: Path, name: str) -> None:
    make, messages = FOLDERS[name]
    make(folder)
    error = refused(folder, *messages)
    assert str(folder.parent) not in str(error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{\n  "a": 1,\n}', "line 3, column 1"),
        (b"", "line 1, column 1"),
        (b"[1]", "must be a JSON object ([1])"),
        (b'{"a": 1, "a": 2}', "the same key stands there twice ('a')"),
        (b'{"x": {"a": 1, "a": 2}}', "twice ('a')"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "not valid UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b" " * (16 << 20) + b"{}", "may not be larger than 16777216 bytes (16777218)"),
    ],
)
def test_refused_configs(folder: Path, config: bytes, message: str) -> None:
    save_file(ONE, folder / SINGLE)
    (folder / "config.json").write_bytes(config)
    refused(folder, "tiny/config.json: ", message)


def test_at_most_ten_problems_are_shown(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    write_index(folder, {"a": SINGLE} | {f"b{i}": SINGLE for i in range(30)})
    error = refused(folder, "... and 20 more")
    assert len(error.problems) == 11


def test_a_pipe_is_no_file(folder: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(folder / SINGLE)
    refused(folder, "no weights")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    (folder / SINGLE).chmod(0)
    refused(folder, "cannot read tiny/model.safetensors (Permission denied)")


def test_files_that_change_after_opening(folder: Path) -> None:
    save_file({"a": torch.ones(99)}, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    cut(folder)
    with pytest.raises(CheckpointError, match="changed after opening"):
        checkpoint.read("a")
    with pytest.raises(CheckpointError, match="changed after opening"):
        list(checkpoint.stream("a"))
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read("a")


def test_threads_share_a_checkpoint_and_leave_no_descriptors(folder: Path) -> None:
    expected = {f"t{i}": torch.full((1000,), float(i)) for i in range(50)}
    save_file(expected, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(n for n, t in expected.items() if not torch.equal(checkpoint.read(n), t))
        for name in expected:  # taken up, and left after the first piece
            next(checkpoint.stream(name))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before


def test_values_may_be_changed_without_changing_the_file(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), ONE["a"])


@settings(max_examples=100, deadline=None)
@given(config=st.binary(max_size=40), index=st.binary(max_size=60) | st.none())
def test_any_config_and_index_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, config: bytes, index: bytes | None
) -> None:
    folder = tmp_path_factory.mktemp("f")
    save_file(ONE, folder / SINGLE)
    (folder / "config.json").write_bytes(config)
    if index is not None:
        (folder / INDEX).write_bytes(b'{"weight_map": ' + index + b"}")
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        return
    assert isinstance(json.loads(config), dict)
    assert list(checkpoint.tensors) == ["a"]


def test_opening_imports_neither_torch_nor_transformers_nor_the_hub(folder: Path) -> None:
    save_file(ONE, folder / SINGLE)
    program = """
import sys
from moe_compose.checkpoint.reader import Checkpoint
checkpoint = Checkpoint.open(sys.argv[1])
checkpoint.digest(), checkpoint.extents("a"), checkpoint.files, checkpoint.total_bytes
assert checkpoint.tensors["a"].shape == (4,)
heavy = {"torch", "transformers", "huggingface_hub", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the real checkpoints of shared/data/models")
@pytest.mark.parametrize("name", sorted(p.name for p in MODELS.glob("*")) or ["none"])
def test_real_checkpoints(name: str) -> None:
    checkpoint = Checkpoint.open(MODELS / name)
    expected = load_file(MODELS / name / SINGLE)
    assert set(checkpoint.tensors) == set(expected)
    assert all(same_bytes(checkpoint.read(n), tensor) for n, tensor in expected.items())
    assert checkpoint.config == json.loads((MODELS / name / "config.json").read_text())
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(checkpoint.files)


def test_links_that_lead_out_of_the_folder_are_left_behind(tmp_path):
    """What a link in a stranger's folder points to must not end up in a result that is shared."""
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "alias.json").symlink_to("tokenizer.json")
    assert set(Checkpoint.open(folder).files) == {"tokenizer.json", "alias.json"}
