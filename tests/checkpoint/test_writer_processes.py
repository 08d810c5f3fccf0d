"""A write under real conditions: killed, interrupted, on a full disk, and watched for memory.

pytest tests/checkpoint/test_writer_processes.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import toy_source
from toy_source import ToySource, byte_source, contents

from moe_compose.checkpoint.source import Extent, TensorInfo
from moe_compose.checkpoint.writer import Progress, write
from moe_compose.errors import WriteError

PROGRAM = Path(toy_source.__file__)


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
        patch.setattr("moe_compose.checkpoint.survey.check_space", lambda *_: None)
        with pytest.raises(WriteError, match="--resume continues after freeing space"):
            write(source, out, shard_size=2 << 20, workers=1)
    assert len(list(out.glob("*.safetensors"))) == 2  # the third lacks the room for its header
    filler.unlink()
    write(source, out, shard_size=2 << 20, resume=True)
    assert contents(out) == contents(tmp_path / "clean")
    write(source, out, shard_size=2 << 20, overwrite=True)  # 10 of 16 MiB: what is replaced counts


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


def test_each_worker_holds_one_computed_piece(tmp_path):
    """A piece is given up before the next one is made, whichever tensor that belongs to."""
    alive, most, lock = 0, 0, threading.Lock()

    def given_up() -> None:
        nonlocal alive
        alive -= 1

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal alive, most
        for _ in range(4):
            values = np.zeros(25, dtype=np.float32)
            weakref.finalize(values, given_up)
            with lock:
                alive += 1
                most = max(most, alive)
            time.sleep(0.002)
            piece = torch.from_numpy(values)
            del values
            yield piece
            del piece

    source = ToySource()
    for i in range(20):
        source.compute(TensorInfo.of(f"t{i}", "F32", (100,)), pieces)
    write(source, tmp_path / "out", workers=3, shard_size=1200)
    assert most == 3


@pytest.mark.parametrize("kernel", [True, False])
def test_copying_takes_no_memory(tmp_path, monkeypatch, kernel):
    folder = tmp_path / "source"
    folder.mkdir()
    path, size = folder / "w.safetensors", 32 << 20
    path.touch()
    os.truncate(path, 8 * size)
    source, peak = ToySource(), 0
    for i in range(8):
        source.copy(TensorInfo.of(f"t{i}", "U8", (size,)), Extent(path, i * size, size))

    def watch(progress: Progress) -> None:
        nonlocal peak
        peak = max(peak, psutil.Process().memory_info().rss)

    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    before = psutil.Process().memory_info().rss
    write(source, tmp_path / "out", workers=2, shard_size=2 * size, progress=watch)
    assert peak - before < 2 * size
