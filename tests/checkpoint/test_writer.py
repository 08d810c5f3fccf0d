"""What a write leaves on the disk.

pytest tests/checkpoint/test_writer.py
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_source import Meter, ToySource, byte_source, contents

from moe_compose.checkpoint import copying, pipeline
from moe_compose.checkpoint.folder import INDEX_NAME
from moe_compose.checkpoint.sharding import DIGEST_KEY, plan_shards
from moe_compose.checkpoint.source import DTYPE_BITS, TORCH_DTYPES, Extent, TensorInfo, torch_dtype
from moe_compose.checkpoint.write_state import STATE_NAME
from moe_compose.checkpoint.writer import Progress, write


def pieces_of(tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    yield from tensor.flatten().split(size) if tensor.numel() else [tensor.flatten()]


def value_of(index: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape) % 50 + index
    return (numbers % 2).bool() if dtype == "BOOL" else numbers.to(torch_dtype(dtype))


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[ToySource, dict[str, torch.Tensor]]:
    """Every dtype of torch, half of them copied, half computed; scalars and empty ones too."""
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


def metered(tmp_path: Path, counts: list[int]) -> tuple[ToySource, Meter]:
    """Tensors of so many elements to compute, a copied one after each."""
    source, meter = byte_source(tmp_path / "source"), Meter()
    copied = list(source.tensors.items())
    source.tensors = {}
    for index, count in enumerate(counts):
        info = TensorInfo.of(f"computed.{index}", "BF16", (count,))
        value = torch.full((count,), index).bfloat16()
        source.compute(
            info, lambda info=info, value=value: meter.measured(info, pieces_of(value, 7))
        )
        source.tensors |= copied[index : index + 1]
    return source, meter


@pytest.mark.parametrize("shard_size", [100, 10**9])
def test_what_is_computed_at_once_is_bounded_in_bytes(tmp_path, monkeypatch, shard_size):
    """1000 elements count 4000 bytes, whatever they are stored in; 3000 are more than allowed."""
    counts = [1000, 1000, 1000, 3000, 10, 1000, 0, 1000]
    monkeypatch.setattr(pipeline, "COMPUTED_BYTES", 8100)
    source, meter = metered(tmp_path, counts)
    write(source, tmp_path / "out", shard_size=shard_size, workers=8)
    assert meter.now == 0
    assert meter.most == 12000  # the large one, and nothing beside it
    monkeypatch.setattr(pipeline, "COMPUTED_BYTES", 10**9)
    write(source, tmp_path / "free", shard_size=shard_size, workers=8)
    assert contents(tmp_path / "free") == contents(tmp_path / "out")


@pytest.mark.parametrize(("bound", "most"), [(1, 4000), (8100, 8000), (12000, 12000)])
def test_as_much_as_fits_is_computed_at_once(tmp_path, monkeypatch, bound, most):
    """The control: without a bound, eight workers would compute eight tensors."""
    monkeypatch.setattr(pipeline, "COMPUTED_BYTES", bound)
    source, meter = metered(tmp_path, [1000] * 12)
    write(source, tmp_path / "out", workers=8)
    assert meter.most == most


def test_copies_overtake_a_tensor_that_waits(tmp_path, monkeypatch):
    """All copies of a shard are done while its first tensor is still being computed."""
    monkeypatch.setattr(pipeline, "COMPUTED_BYTES", 1)
    source, copied = byte_source(tmp_path / "source"), threading.Event()
    for name in ("a", "b"):
        info = TensorInfo.of(name, "I64", (1,))  # wide elements come first in a shard

        def waits() -> Iterator[torch.Tensor]:
            assert copied.wait(timeout=30)
            yield torch.ones(1, dtype=torch.int64)

        source.compute(info, waits)

    def seen(progress: Progress) -> None:
        if progress.bytes_done >= 8000:
            copied.set()

    write(source, tmp_path / "out", workers=2, progress=seen)
    assert copied.is_set()


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
    for before, after in pairwise(shards):
        first = next(t for t in tensors if t.name in {p.info.name for p in after.placements})
        assert before.nbytes + first.nbytes > shard_size
