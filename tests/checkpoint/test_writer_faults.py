"""A write that is interrupted anywhere, in any way, and continued ends with the same bytes.

Most interruptions are simulated: from some call on, nothing changes the disk any more, as after `kill -9`. A few are real.

    pytest tests/checkpoint/test_writer_faults.py
"""

from __future__ import annotations

import errno
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from moe_compose.checkpoint.source import CHUNK_BYTES, Extent, TensorInfo
from moe_compose.checkpoint.write_state import STATE_NAME
from moe_compose.checkpoint.writer import Progress, write
from moe_compose.errors import CheckpointError, WriteError

PROGRAM = Path(__file__).with_name("toy_source.py")
_toys = runpy.run_path(str(PROGRAM))
ToySource, byte_source = _toys["ToySource"], _toys["byte_source"]

SHARD = 2500
CHANGES = ("pwrite", "copy_file_range", "truncate", "fsync", "replace", "unlink", "mkdir")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


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
    """Counts calls that change the disk; from a given one on they all fail, cleaning up included."""

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


def every_cut(disk: Disk, begin: Callable[[], object]) -> Iterator[int]:
    """Run `begin` again and again, cut after 0, 1, 2, ... calls, until it gets through; yields after each cut."""
    for calls in range(10_000):
        disk.cut_after(calls)
        try:
            begin()
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
    out = root / "out"
    cuts = 0
    for cut in every_cut(disk, lambda: write(source, out, shard_size=SHARD, workers=workers)):
        cuts += 1
        write(source, out, shard_size=SHARD, workers=workers, resume=True)
        assert contents(out) == contents(tmp_path / "clean")
        out = root / f"out{cut}"
    assert cuts > 50


def test_a_resume_can_be_killed_again_and_again(tmp_path, monkeypatch):
    """Each attempt gets one call further than the one before, and leaves its remains to the next."""
    source, out = half_computed(tmp_path / "source"), tmp_path / "out"
    write(source, tmp_path / "clean", shard_size=SHARD)
    disk = Disk(monkeypatch, PowerCut)
    for _ in every_cut(disk, lambda: write(source, out, shard_size=SHARD, resume=True)):
        pass
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("old_config", [{}, {"old": True}], ids=["same plan", "other plan"])
def test_overwriting_can_be_killed_anywhere(tmp_path, monkeypatch, old_config):
    """Old weights never survive into the new checkpoint, although their headers may be the same."""
    source, out = half_computed(tmp_path / "source"), tmp_path / "out"
    stale = byte_source(tmp_path / "other source")
    stale.config = {**source.config, **old_config}
    for info in source.tensors.values():
        stale.copy(info, Extent(tmp_path / "other source/weights.safetensors", 0, info.nbytes))
    stale.tensors = {name: stale.tensors[name] for name in source.tensors}
    write(source, tmp_path / "clean", shard_size=SHARD)
    disk = Disk(monkeypatch, PowerCut)
    write(stale, out, shard_size=SHARD)
    for _ in every_cut(disk, lambda: write(source, out, shard_size=SHARD, overwrite=True)):
        state = out / STATE_NAME
        began = state.exists() and state.stat().st_size
        write(source, out, shard_size=SHARD, resume=bool(began), overwrite=not began)
        assert contents(out) == contents(tmp_path / "clean")
        write(stale, out, shard_size=SHARD, overwrite=True)
    assert contents(out) == contents(tmp_path / "clean")


def test_every_failing_call_is_reported_and_can_be_resumed(tmp_path, monkeypatch):
    """A single call fails, the next ones work: what is left can be continued, and holds no half files."""
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_really_full_disk(tmp_path, small_disk, monkeypatch):
    source = byte_source(tmp_path / "source", tensors=5, nbytes=2 << 20)
    write(source, tmp_path / "clean", shard_size=2 << 20)
    out, filler = small_disk / "out", small_disk / "filler"
    filler.write_bytes(b"x" * (10 << 20))
    with pytest.raises(WriteError, match=r"needs 14\.0 MiB, available 6\.0 MiB") as caught:
        write(source, out, shard_size=2 << 20)
    assert "--dtype" in str(caught.value)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("moe_compose.checkpoint.destination.check_space", lambda *_: None)
        with pytest.raises(WriteError, match="--resume continues after freeing space"):
            write(source, out, shard_size=2 << 20)
    kept = len(list(out.glob("*.safetensors")))
    assert 1 <= kept <= 3
    filler.unlink()
    write(source, out, shard_size=2 << 20, resume=True)
    assert contents(out) == contents(tmp_path / "clean")
    write(source, out, shard_size=2 << 20, overwrite=True)  # 10 of 16 MiB: what is replaced counts


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ToySource, Path]:
    """A source, and a folder with the first shards of it."""
    source, out = byte_source(tmp_path / "source"), tmp_path / "out"
    disk = Disk(monkeypatch, PowerCut)
    disk.cut_after(40)
    with pytest.raises(PowerCut):
        write(source, out, shard_size=1000, workers=1)
    disk.restore()
    assert 0 < len(list(out.glob("*.safetensors"))) < 8
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


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """A slow write, about 80 × 10 ms, in a process of its own."""
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), "1000", *flags]
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(process: subprocess.Popen[str], nbytes: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line.split()[0]) >= nbytes:
            return
    pytest.fail(f"ended early: {process.communicate()[1]}")


@pytest.mark.parametrize("points", [(0,), (2500,), (4000, 6000)])
def test_really_killed_and_resumed(tmp_path, points):
    source = byte_source(tmp_path / "source")
    write(source, tmp_path / "clean", shard_size=1000)
    for i, point in enumerate(points):
        process = start(tmp_path, *(["resume"] if i else []))
        wait_until(process, point)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGKILL
    write(source, tmp_path / "out", shard_size=1000, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_really_interrupted_by_the_keyboard(tmp_path):
    source = byte_source(tmp_path / "source")
    process = start(tmp_path)
    wait_until(process, 3000)
    with pytest.raises(WriteError, match="another process is writing"):
        write(source, tmp_path / "out", shard_size=1000, resume=True)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    assert not list((tmp_path / "out").glob("*.part"))
    assert list((tmp_path / "out").glob("*.safetensors"))
    write(source, tmp_path / "clean", shard_size=1000)
    write(source, tmp_path / "out", shard_size=1000, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_at_most_one_computed_tensor_per_worker(tmp_path):
    alive, most, lock = 0, 0, threading.Lock()

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.005)
        yield torch.zeros(100)
        with lock:
            alive -= 1

    source = ToySource()
    for i in range(20):
        source.compute(TensorInfo.of(f"t{i}", "F32", (100,)), pieces)
    write(source, tmp_path / "out", workers=2, shard_size=1200)
    assert most == 2


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """256 MiB through two workers, half copied, half computed in pieces: some pieces are held, not the whole."""
    folder = tmp_path / "source"
    folder.mkdir()
    path, size = folder / "w.safetensors", 32 << 20
    path.touch()
    os.truncate(path, 4 * size)
    source = ToySource()
    peak = 0

    def pieces() -> Iterator[torch.Tensor]:
        for _ in range(size // CHUNK_BYTES):
            yield torch.zeros(CHUNK_BYTES, dtype=torch.uint8)

    def watch(progress: Progress) -> None:
        nonlocal peak
        peak = max(peak, psutil.Process().memory_info().rss)

    for i in range(4):
        source.copy(TensorInfo.of(f"c{i}", "U8", (size,)), Extent(path, i * size, size))
        source.compute(TensorInfo.of(f"n{i}", "U8", (size,)), pieces)
    before = psutil.Process().memory_info().rss
    write(source, tmp_path / "out", workers=2, shard_size=2 * size, progress=watch)
    assert peak - before < 6 * CHUNK_BYTES
