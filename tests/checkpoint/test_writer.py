"""What a write leaves on the disk, and what it refuses to touch.

pytest tests/checkpoint/test_writer.py
"""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_compose.checkpoint import copying
from moe_compose.checkpoint.sharding import DIGEST_KEY, INDEX_NAME, plan_shards
from moe_compose.checkpoint.source import DTYPE_BITS, TORCH_DTYPES, Extent, TensorInfo, torch_dtype
from moe_compose.checkpoint.write_state import STATE_NAME, StateFile
from moe_compose.checkpoint.writer import Progress, check_destination, write
from moe_compose.errors import CheckpointError, OptionError, PlanError, WriteError

_toys = runpy.run_path(str(Path(__file__).with_name("toy_source.py")))
ToySource, byte_source = _toys["ToySource"], _toys["byte_source"]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def pieces_of(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    yield from tensor.flatten().split(size) if tensor.numel() else [tensor.flatten()]


def value_of(index: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape) % 50 + index
    return (numbers % 2).bool() if dtype == "BOOL" else numbers.to(torch_dtype(dtype))


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[ToySource, dict[str, torch.Tensor]]:
    """Every dtype of torch, half of them copied from a file and half computed, scalars and empty ones too."""
    folder = tmp_path / "source"
    folder.mkdir()
    source = ToySource(config={"b": 1, "a": "é"}, files={"sub/vocab.txt": folder / "vocab.txt"})
    (folder / "vocab.txt").write_bytes(b"\x00\r\nx")
    (folder / "config.json").write_text("{}")
    values = {}
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 4)]
    for index, dtype in enumerate(d for d in TORCH_DTYPES if d != "F8_E8M0"):
        shape = shapes[index % len(shapes)]
        name = f"layers.{index}.{dtype}"
        value = values[name] = value_of(index, dtype, shape)
        info = TensorInfo.of(name, dtype, shape)
        if index % 2:
            source.compute(info, lambda value=value: pieces_of(value, 4))
        else:
            data = folder / f"{index}.raw"
            data.write_bytes(b"?" * 3 + bytes(value.reshape(-1).view(torch.uint8).numpy()))
            source.copy(info, Extent(data, 3, info.nbytes))
    return source, values


@pytest.mark.parametrize("shard_size", [1, 60, 10**9])
def test_safetensors_reads_what_was_written(mixed, tmp_path, shard_size):
    source, values = mixed
    out = tmp_path / "out"
    written = write(source, out, shard_size=shard_size, workers=3)
    assert set(written.tensors) == set(values)
    loaded = {}
    shards = sorted(out.glob("*.safetensors"))
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt", DIGEST_KEY: source.digest()}
        loaded |= load_file(shard)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name].to(torch.complex64), value.to(torch.complex64))
    single = shard_size == 10**9
    assert (out / INDEX_NAME).exists() != single
    assert [s.name for s in shards] == ["model.safetensors"] if single else len(shards) > 3
    assert (out / "config.json").read_text() == '{\n  "b": 1,\n  "a": "é"\n}\n'
    assert (out / "sub/vocab.txt").read_bytes() == b"\x00\r\nx"
    assert not (out / STATE_NAME).exists()


def test_index_lists_tensors_in_source_order(mixed, tmp_path):
    source, _ = mixed
    write(source, tmp_path / "out", shard_size=60)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert list(index["weight_map"]) == list(source.tensors)
    assert index["metadata"] == {
        "total_size": sum(i.nbytes for i in source.tensors.values()),
        "total_parameters": sum(i.numel for i in source.tensors.values()),
    }
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


@pytest.mark.parametrize("shard_size", [60, 10**9])
def test_bytes_do_not_depend_on_workers(mixed, tmp_path, shard_size):
    source, _ = mixed
    outs = [tmp_path / f"out{i}" for i in range(3)]
    for out, workers in zip(outs, (1, 4, 4), strict=True):
        write(source, out, shard_size=shard_size, workers=workers)
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])


def test_values_do_not_depend_on_shard_size(mixed, tmp_path):
    source, _ = mixed
    first = write(source, tmp_path / "a", shard_size=60)
    second = write(first, tmp_path / "b", shard_size=10**9)
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        one, two = (b"".join(raw(c, name)) for c in (first, second))
        assert one == two


def raw(checkpoint, name: str) -> Iterator[bytes]:
    for extent in checkpoint.extents(name):
        yield extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]


def test_rewriting_a_checkpoint_gives_its_own_bytes(mixed, tmp_path):
    """A checkpoint is a source like any other; only the digest of the source may differ."""
    source, _ = mixed
    first = write(source, tmp_path / "a", shard_size=10**9)
    second = write(first, tmp_path / "b", shard_size=10**9)
    third = write(second, tmp_path / "c", shard_size=10**9)
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert third.config == source.config


def test_rows_of_a_stacked_tensor_are_copied(tmp_path):
    (tmp_path / "source").mkdir()
    stacked = torch.arange(60, dtype=torch.float32).reshape(5, 3, 4)
    save_file({"experts": stacked}, tmp_path / "source/w.safetensors")
    path = tmp_path / "source/w.safetensors"
    start, row = path.stat().st_size - 240, 48
    source = ToySource()
    extents = [Extent(path, start + e * row, row) for e in (3, 0, 1)]
    source.copy(TensorInfo.of("experts", "F32", (3, 3, 4)), *extents)
    write(source, tmp_path / "out")
    loaded = load_file(tmp_path / "out/model.safetensors")["experts"]
    assert torch.equal(loaded, stacked[[3, 0, 1]])


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", (3, 6), 9), ("Q3_K", (5,), 11)])
def test_dtypes_without_values_are_copied(tmp_path, dtype, shape, nbytes):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source/raw"
    path.write_bytes(bytes(range(nbytes)))
    source = ToySource()
    source.compute(TensorInfo.of("x", "F32", (2,)), lambda: iter([torch.ones(2)]))
    source.copy(TensorInfo("q", dtype, shape, nbytes), Extent(path, 0, nbytes))
    write(source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes().endswith(bytes(range(nbytes)))


def test_adjacent_extents_become_one_copy(tmp_path, monkeypatch):
    calls = []

    def count(source, target, size, start, position):
        calls.append(size)
        return real(source, target, size, start, position)

    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", count)
    source = byte_source(tmp_path / "source")
    source.files = {}
    write(source, tmp_path / "out")
    assert calls == [8000]


def test_no_tensors_at_all(tmp_path):
    write(ToySource(), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors") == {}


def test_kernel_copies_are_replaced_where_impossible(tmp_path, monkeypatch):
    source = byte_source(tmp_path / "source")
    write(source, tmp_path / "a", shard_size=2500)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 300)
    monkeypatch.setattr(copying, "SLICE_BYTES", 700)
    write(source, tmp_path / "small slices", shard_size=2500)
    for error in (
        OSError(18, "cross-device"),
        OSError(22, "invalid"),
        OSError(38, "no call"),
        None,
    ):

        def fail(*_, error=error):
            if error is None:
                return 0
            raise error

        monkeypatch.setattr(os, "copy_file_range", fail)
        out = tmp_path / f"error {error}"
        write(source, out, shard_size=2500)
        assert contents(out) == contents(tmp_path / "a") == contents(tmp_path / "small slices")
    monkeypatch.delattr(os, "copy_file_range")
    write(source, tmp_path / "absent", shard_size=2500)
    assert contents(tmp_path / "absent") == contents(tmp_path / "a")


def test_progress_covers_all_bytes(tmp_path):
    seen: list[Progress] = []
    write(byte_source(tmp_path / "source"), tmp_path / "out", shard_size=2500, progress=seen.append)
    assert [p.bytes_total for p in seen] == [8000] * len(seen)
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert seen[-1].bytes_done == 8000
    assert seen[-1].shard.endswith(".safetensors")


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


# The layout, for any tensors

infos = st.lists(
    st.builds(
        lambda dtype, shape: TensorInfo.of("", dtype, tuple(shape)),
        st.sampled_from([d for d in DTYPE_BITS if DTYPE_BITS[d] >= 8]),
        st.lists(st.integers(0, 6), max_size=3),
    ),
    max_size=20,
).map(lambda found: [TensorInfo(f"t{i}", t.dtype, t.shape, t.nbytes) for i, t in enumerate(found)])


@given(infos, st.integers(1, 3000))
def test_layout(tensors, shard_size):
    shards = plan_shards(tensors, shard_size, "d")
    placed = [p.info.name for shard in shards for p in shard.placements]
    assert sorted(placed) == sorted(t.name for t in tensors)
    for shard in shards:
        assert (
            shard.nbytes <= shard_size or len([p for p in shard.placements if p.info.nbytes]) == 1
        )
        header = json.loads(shard.header[8:])
        assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
        assert len(shard.header) % 8 == 0
        end = len(shard.header)
        for p in shard.placements:
            assert p.offset == end
            assert p.offset % (DTYPE_BITS[p.info.dtype] // 8) == 0
            end += p.info.nbytes
            offsets = [p.offset - len(shard.header), end - len(shard.header)]
            assert header[p.info.name]["data_offsets"] == offsets
        assert end == shard.size
    for before, after in zip(shards, shards[1:], strict=False):
        first = next(t for t in tensors if t.name in {p.info.name for p in after.placements})
        assert before.nbytes + first.nbytes > shard_size
