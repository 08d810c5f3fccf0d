"""A write that is interrupted anywhere, and continued, ends with the same bytes.

Interruptions are simulated: from some call on, nothing changes the disk, as after `kill -9`.

    pytest tests/checkpoint/test_writer_faults.py
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from toy_source import ToySource, byte_source, contents

from moe_compose.checkpoint.source import Extent, TensorInfo
from moe_compose.checkpoint.write_state import STATE_NAME
from moe_compose.checkpoint.writer import Progress, write
from moe_compose.errors import CheckpointError, WriteError

SHARD = 2500
CHANGES = ("pwrite", "copy_file_range", "truncate", "fsync", "replace", "unlink", "mkdir")


def half_computed(folder: Path) -> ToySource:
    """Copied tensors, and computed ones between them."""
    source = byte_source(folder, tensors=6)
    tensors = ToySource(config=source.config, files=source.files)
    for i, info in enumerate(source.tensors.values()):
        tensors.copy(info, *source.copied[info.name])
        value = torch.arange(200, dtype=torch.float32) * i
        tensors.compute(TensorInfo.of(f"new.{i}", "F32", (200,)), lambda v=value: iter(v.split(70)))
    return tensors


class PowerCut(BaseException):
    """Nothing reaches the disk any more, and nobody can handle it."""


class Disk:
    """Counts calls that change the disk; from a given one on they all fail, clean-up too."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], BaseException]
    ) -> None:
        self.calls, self.last, self.failure = 0, 10**9, failure
        self.lock = threading.Lock()
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name), name == "fsync"))
        monkeypatch.setattr(os, "open", self._counted_open(os.open))

    def count(self) -> None:
        with self.lock:
            self.calls += 1
            if self.calls > self.last:
                raise self.failure()

    def _counted(self, real, skip: bool):
        def call(*args, **options):
            self.count()
            return None if skip else real(*args, **options)

        return call

    def _counted_open(self, real):
        def call(path, flags, mode=0o777, **options):
            if flags & os.O_CREAT:
                self.count()
            return real(path, flags, mode, **options)

        return call

    def cut_after(self, calls: int) -> None:
        self.calls, self.last = 0, calls

    def restore(self) -> None:
        self.last = 10**9


def every_cut(disk: Disk, begin: Callable[[int], object]) -> Iterator[int]:
    """Run `begin(n)`, cut after n = 0, 1, 2, ... calls, until it gets through."""
    for calls in range(10_000):
        disk.cut_after(calls)
        try:
            begin(calls)
        except PowerCut:
            disk.restore()
            yield calls
        else:
            disk.restore()
            return


@pytest.mark.parametrize("workers", [1, 3])
def test_resume_after_every_possible_kill(tmp_path, monkeypatch, workers):
    source = half_computed(tmp_path / "source")
    write(source, tmp_path / "clean", shard_size=SHARD)
    disk = Disk(monkeypatch, PowerCut)
    root = tmp_path / "x"
    root.mkdir()
    options = {"shard_size": SHARD, "workers": workers}
    cut = 0
    for cut in every_cut(disk, lambda n: write(source, root / str(n), **options)):
        write(source, root / str(cut), **options, resume=True)
        assert contents(root / str(cut)) == contents(tmp_path / "clean")
    assert cut > 50


def test_a_resume_can_be_killed_again_and_again(tmp_path, monkeypatch):
    """Each attempt gets one call further than the one before, and leaves its remains behind."""
    source, out = half_computed(tmp_path / "source"), tmp_path / "out"
    write(source, tmp_path / "clean", shard_size=SHARD)
    disk = Disk(monkeypatch, PowerCut)
    for _ in every_cut(disk, lambda _: write(source, out, shard_size=SHARD, resume=True)):
        pass
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("old_config", [{}, {"old": True}], ids=["same plan", "other plan"])
def test_overwriting_can_be_killed_anywhere(tmp_path, monkeypatch, old_config):
    """Old weights never survive into the new checkpoint, although their headers may be the same;
    nor do files that belonged to them.
    """
    source, out = half_computed(tmp_path / "source"), tmp_path / "out"
    stale = byte_source(tmp_path / "other source")
    stale.files["generation_config.json"] = tmp_path / "other source" / "config.json"
    stale.config = {**source.config, **old_config}
    for info in source.tensors.values():
        stale.copy(info, Extent(tmp_path / "other source/weights.safetensors", 0, info.nbytes))
    stale.tensors = {name: stale.tensors[name] for name in source.tensors}
    write(source, tmp_path / "clean", shard_size=SHARD)
    disk = Disk(monkeypatch, PowerCut)
    write(stale, out, shard_size=SHARD)
    for _ in every_cut(disk, lambda _: write(source, out, shard_size=SHARD, overwrite=True)):
        state = out / STATE_NAME
        began = state.exists() and state.stat().st_size
        write(source, out, shard_size=SHARD, resume=bool(began), overwrite=not began)
        assert contents(out) == contents(tmp_path / "clean")
        write(stale, out, shard_size=SHARD, overwrite=True)
    assert contents(out) == contents(tmp_path / "clean")


def test_every_failing_call_is_reported_and_can_be_resumed(tmp_path, monkeypatch):
    """A single call fails, the next ones work: what is left is no half file, and can go on."""
    source = half_computed(tmp_path / "source")
    write(source, tmp_path / "clean", shard_size=SHARD)
    disk = Disk(monkeypatch, lambda: OSError(errno.EIO, "I/O error"))
    real_count = disk.count
    fails = False

    def count_once() -> None:
        nonlocal fails
        try:
            real_count()
        except OSError:
            disk.last = 10**9
            fails = True
            raise

    monkeypatch.setattr(disk, "count", count_once)
    for calls in range(1000):
        out, fails = tmp_path / f"out{calls}", False
        disk.cut_after(calls)
        try:
            write(source, out, shard_size=SHARD, workers=2)
        except WriteError as error:
            assert "I/O error" in str(error)  # noqa: PT017 - which call fails is not known
            assert not list(out.glob("*.safetensors.part"))
        disk.restore()
        write(source, out, shard_size=SHARD, resume=True)
        assert contents(out) == contents(tmp_path / "clean")
        if not fails:
            break
    assert calls > 50


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync"])
def test_full_disk_keeps_finished_shards(tmp_path, monkeypatch, code, call):
    source, out = half_computed(tmp_path / "source"), tmp_path / "out"
    write(source, tmp_path / "clean", shard_size=SHARD)
    real = getattr(os, call)

    def full(*args):
        if list(out.glob("model-00002-*.safetensors")):
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteError, match="--resume continues after freeing space") as caught:
        write(source, out, shard_size=SHARD, workers=1)
    monkeypatch.undo()
    assert os.strerror(code) in str(caught.value)
    kept = sorted(out.glob("*.safetensors"))
    assert len(kept) >= 2
    assert not list(out.glob("*.safetensors.part"))
    times = [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(WriteError, match=rf"\({len(kept)} of 6 shards of the same plan") as caught:
        write(source, out, shard_size=SHARD)
    assert str(caught.value).endswith(
        "\n  Continue with --resume, or start again with --overwrite."
    )
    seen: list[Progress] = []
    write(source, out, shard_size=SHARD, resume=True, progress=seen.append)
    assert seen[0].bytes_done >= 1000 * len(kept)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert contents(out) == contents(tmp_path / "clean")


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ToySource, Path]:
    """A source of 8 shards, and a folder with some of them: at least 3."""
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    real = os.pwrite

    def cut(*args) -> int:
        if len(list(out.glob("*.safetensors"))) >= 3:
            raise PowerCut
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", cut)
        with pytest.raises(PowerCut):
            write(source, out, shard_size=1000)
    assert 3 <= len(list(out.glob("*.safetensors"))) < 8
    return source, out


def test_changed_source_is_refused(tmp_path, monkeypatch):
    source, out = interrupted(tmp_path, monkeypatch)
    os.utime(tmp_path / "source/weights.safetensors", ns=(1, 1))
    with pytest.raises(WriteError, match=r"source changed since .*\(weights\.safetensors\)"):
        write(source, out, shard_size=1000, resume=True)
    write(source, out, shard_size=1000, overwrite=True)


def test_other_plan_and_other_shards_are_refused(tmp_path, monkeypatch):
    source, out = interrupted(tmp_path, monkeypatch)
    other = source.with_config(x=1)
    with pytest.raises(
        WriteError, match=f"another plan.*{source.digest()[:8]}.*{other.digest()[:8]}"
    ):
        write(other, out, shard_size=1000, resume=True)
    with pytest.raises(WriteError, match=r"unfinished write of another plan"):
        write(other, out, shard_size=1000)
    with pytest.raises(WriteError, match=r"another size \(8 files; --shard-size now gives 4\)"):
        write(source, out, shard_size=2000, resume=True)


def test_shard_of_another_plan_is_refused(tmp_path, monkeypatch):
    source, out = interrupted(tmp_path, monkeypatch)
    write(source.with_config(x=1), tmp_path / "other", shard_size=1000)
    name = "model-00008-of-00008.safetensors"
    os.replace(tmp_path / "other" / name, out / name)
    with pytest.raises(WriteError, match=f"another plan.*{name}"):
        write(source, out, shard_size=1000, resume=True)


def test_damaged_shards_are_written_again(tmp_path, monkeypatch):
    source, out = interrupted(tmp_path, monkeypatch)
    shards = sorted(out.glob("*.safetensors"))
    os.truncate(shards[0], shards[0].stat().st_size - 1)
    os.truncate(shards[1], 0)
    write(source, out, shard_size=1000, resume=True)
    write(source, tmp_path / "clean", shard_size=1000)
    assert contents(out) == contents(tmp_path / "clean")


def test_unfinished_folder_is_no_checkpoint(tmp_path, monkeypatch):
    from moe_compose.checkpoint.reader import Checkpoint

    _, out = interrupted(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="unfinished"):
        Checkpoint.open(out)


def test_interrupt_in_the_progress_callback_ends_all_threads(tmp_path):
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    before = threading.active_count()

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, out, shard_size=1000, progress=interrupt)
    assert threading.active_count() == before
    assert not list(out.glob("*.part"))
    write(source, out, shard_size=1000, resume=True)
