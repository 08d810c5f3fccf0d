"""What a write refuses to begin, and what it refuses to touch.

pytest tests/checkpoint/test_writer_refusals.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from toy_source import ToySource, byte_source, contents

from moe_compose.checkpoint.folder import INDEX_NAME
from moe_compose.checkpoint.source import Extent, TensorInfo
from moe_compose.checkpoint.write_state import STATE_NAME, StateFile
from moe_compose.checkpoint.writer import check_destination, write
from moe_compose.errors import CheckpointError, OptionError, PlanError, WriteError

# What a source may get wrong


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([torch.ones(3)], "only 12"),
        ([torch.ones(3), torch.ones(2)], "more"),
        ([torch.ones(4, dtype=torch.int32)], "dtype"),
        ([], "only 0"),
    ],
)
def test_values_other_than_declared_are_refused(tmp_path, pieces, says):
    source = ToySource()
    source.compute(TensorInfo.of("x", "F32", (4,)), lambda: iter(pieces))
    with pytest.raises(PlanError, match=f"^x declares .*{says}"):
        write(source, tmp_path / "out")


def test_extents_of_another_size_are_refused_before_a_byte(tmp_path):
    source = byte_source(tmp_path / "source")
    source.copy(TensorInfo.of("x", "U8", (5,)), Extent(tmp_path / "source/config.json", 0, 2))
    with pytest.raises(PlanError, match="x: declares 5 bytes, is copied from 2"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_source_is_named(tmp_path):
    source = byte_source(tmp_path / "source")
    os.truncate(tmp_path / "source/weights.safetensors", 5500)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is shorter than its header"):
        write(source, tmp_path / "out", shard_size=1000)
    assert not list((tmp_path / "out").glob("*.part"))


def test_errors_of_a_source_pass_unchanged(tmp_path):
    source = ToySource()

    def fails() -> Iterator[torch.Tensor]:
        yield torch.ones(1)
        raise ZeroDivisionError("from a transform")

    source.compute(TensorInfo.of("x", "F32", (4,)), fails)
    with pytest.raises(ZeroDivisionError, match="from a transform"):
        write(source, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../../x", "", "config.json", INDEX_NAME, "model.safetensors", STATE_NAME],
)
def test_names_of_carried_files(tmp_path, name):
    source = byte_source(tmp_path / "source")
    source.files = {name: tmp_path / "source/tokenizer.json"}
    with pytest.raises(PlanError, match="names of their own"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_carried_file(tmp_path):
    source = byte_source(tmp_path / "source")
    source.files["x"] = tmp_path / "source/gone"
    with pytest.raises(CheckpointError, match="gone"):
        write(source, tmp_path / "out")


# Folders that are refused, and those that are replaced


@pytest.mark.parametrize(
    "options", [{"shard_size": 0}, {"workers": 0}, {"resume": 1, "overwrite": 1}]
)
def test_options_that_cannot_be_meant(tmp_path, options):
    with pytest.raises(OptionError):
        write(byte_source(tmp_path / "source"), tmp_path / "out", **options)


def test_parents_are_created(tmp_path):
    write(byte_source(tmp_path / "source"), tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/model.safetensors").exists()


@pytest.mark.parametrize("dangling", [True, False])
def test_symbolic_link_is_refused(tmp_path, dangling):
    if not dangling:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(WriteError, match="symbolic link"):
            write(byte_source(tmp_path / "source"), tmp_path / "out", **options)


def test_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out/below"):
        with pytest.raises(WriteError, match="is a file"):
            write(byte_source(tmp_path / "source"), out, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_unwritable_folder_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    if os.access(
        out, os.W_OK
    ):  # root may write anywhere: let the question be answered as for others
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(WriteError, match="must be writable"):
        write(byte_source(tmp_path / "source"), out)


@pytest.mark.parametrize(
    ("place", "relation"),
    [
        ("source", "is"),
        ("link", "leads"),
        ("link/out", "inside"),
        ("source/a/b", "inside"),
        ("", "contains"),
    ],
)
def test_output_that_touches_a_source_is_refused(tmp_path, place, relation):
    root = tmp_path / "models"
    source = byte_source(root / "source")
    (root / "link").symlink_to(root / "source")
    (root / "config.json").write_text("{}")
    before = contents(root)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(WriteError, match=relation):
            write(source, root / place, **options)
    assert contents(root) == before


def test_output_that_holds_the_target_of_a_link_is_refused(tmp_path):
    """As in the Hub's cache: the source's files are links to blobs elsewhere."""
    source = byte_source(tmp_path / "blobs")
    (tmp_path / "blobs" / STATE_NAME).write_text("{}")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot/model.safetensors"
    link.symlink_to(tmp_path / "blobs/weights.safetensors")
    linked = ToySource()
    linked.copy(source.tensors["layers.0.weight"], Extent(link, 0, 1000))
    for out in ("blobs", "snapshot"):
        with pytest.raises(WriteError, match="must not touch its sources"):
            write(linked, tmp_path / out, overwrite=True)


def test_computed_source_is_protected_by_its_carried_files(tmp_path):
    toy = byte_source(tmp_path / "source")
    source = ToySource(files=toy.files)
    source.compute(TensorInfo.of("x", "F32", (1,)), lambda: iter([torch.ones(1)]))
    with pytest.raises(WriteError, match="must not touch its sources"):
        write(source, tmp_path / "source", overwrite=True)


def test_unrelated_files_are_never_touched(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    (out / "src").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (out / name).write_text("mine")
    with pytest.raises(WriteError, match=r"is not empty \(a\.txt, b\.txt, c\.txt and 2 more\)"):
        write(source, out)
    with pytest.raises(WriteError, match="nothing to resume"):
        write(source, out, resume=True)
    with pytest.raises(WriteError, match="only a checkpoint"):
        write(source, out, overwrite=True)
    assert len(contents(out)) == 4


def test_finished_checkpoint(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    write(source, out, shard_size=2000)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(WriteError, match=f"finished checkpoint .*digest {source.digest()[:8]}"):
        write(source, out, shard_size=2000)
    assert set(write(source, out, shard_size=2000, resume=True).tensors) == set(source.tensors)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(WriteError, match="shards of another size"):
        write(source, out, shard_size=4000, resume=True)
    with pytest.raises(WriteError, match="weights of another plan"):
        write(source.with_config(x=1), out, shard_size=2000, resume=True)
    with pytest.raises(WriteError, match=r"not empty \(a checkpoint"):
        write(source.with_config(x=1), out, shard_size=2000)
    assert contents(out) == before


def test_overwrite_replaces_a_checkpoint_and_leaves_the_rest(tmp_path):
    source, out, clean = byte_source(tmp_path / "source"), tmp_path / "out", tmp_path / "clean"
    write(source.with_config(old=True), out, shard_size=1000)
    for name in ("pytorch_model.bin", "validation.json", "x.safetensors.part", "notes.md"):
        (out / name).write_text("old")
    write(source, out, shard_size=4000, overwrite=True)
    write(source, clean, shard_size=4000)
    assert contents(out) == contents(clean) | {"notes.md": b"old"}


BELONGING = (
    *("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "qwen.tiktoken", "generation_config.json", "chat_template.jinja"),
    *("chat_template.json", "additional_chat_templates/tool_use.jinja", "moe_compose.json"),
)


def test_overwrite_removes_what_belonged_to_the_old_checkpoint(tmp_path):
    """A tokenizer or an eos token of another model would be served without a word."""
    source, out, clean = byte_source(tmp_path / "source"), tmp_path / "out", tmp_path / "clean"
    write(source.with_config(old=True), out)
    (out / "additional_chat_templates").mkdir()
    mine = ("LICENSE", "my_tokenizer.json", "notes/tokenizer.json", "classifier.model", "vocab.md")
    (out / "notes").mkdir()
    (out / "tokenizer_experiments").mkdir()
    for name in (*BELONGING, *mine):
        (out / name).write_text("old")
    found = check_destination(source, out, overwrite=True)
    assert {*BELONGING} <= {*found.removed}
    write(source, out, overwrite=True)
    write(source, clean)
    assert contents(out) == contents(clean) | dict.fromkeys(sorted(mine), b"old")
    assert (out / "tokenizer_experiments").is_dir()


def test_overwrite_does_not_follow_links_to_folders(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    write(source, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jinja").write_text("mine")
    (out / "additional_chat_templates").symlink_to(tmp_path / "mine")
    write(source, out, overwrite=True)
    assert (tmp_path / "mine" / "a.jinja").read_text() == "mine"


def test_overwriting_links_removes_the_links_only(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "model.safetensors.part"):
        (tmp_path / name).write_text("elsewhere")
        (out / name).symlink_to(tmp_path / name)
    write(source, out, overwrite=True)
    assert (tmp_path / "config.json").read_text() == "elsewhere"
    assert (tmp_path / "model.safetensors").read_text() == "elsewhere"
    assert (tmp_path / "tokenizer.json").read_text() == "elsewhere"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_carried_files_do_not_follow_links_out(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (out / "sub").symlink_to(tmp_path / "elsewhere")
    source.files = {"sub/x": tmp_path / "source/tokenizer.json"}
    with pytest.raises(WriteError, match="outside of"):
        write(source, out, overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_second_writer_is_refused(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    with StateFile(out) as state:
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(WriteError, match="another process is writing"):
                check_destination(source, out, **options)
            with pytest.raises(WriteError, match="another process is writing"):
                StateFile(out)
        state.remove()
    write(source, out)


def test_check_says_what_would_be_done_and_writes_nothing(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    found = check_destination(source, out, shard_size=2000)
    assert [s.name for s in found.shards][-1] == "model-00004-of-00004.safetensors"
    assert (found.bytes_total, found.bytes_kept, found.finished) == (8000, 0, False)
    assert not out.exists()
    write(source, out, shard_size=2000)
    before = contents(out)
    found = check_destination(source, out, shard_size=2000, overwrite=True)
    assert found.removed[0] == INDEX_NAME
    assert check_destination(source, out, shard_size=2000, resume=True).finished
    assert contents(out) == before


def test_a_source_that_is_only_computed_from_is_protected(tmp_path):
    """Nothing is copied from it, nothing carried along: it must still not be overwritten."""
    weights = tmp_path / "source" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"precious")
    made = ToySource(weight_files=(weights,))
    made.compute(TensorInfo.of("x", "F32", (4,)), lambda: iter([torch.ones(4)]))
    with pytest.raises(WriteError, match="source/ is"):
        write(made, weights.parent, overwrite=True)
    assert weights.read_bytes() == b"precious"
