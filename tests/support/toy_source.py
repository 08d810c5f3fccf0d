"""A small `TensorSource` made of explicit parts, and a program that writes one, to be killed.

Run as a program, to be killed or interrupted, it never imports torch:

    python tests/support/toy_source.py SOURCE OUT SHARD_SIZE [resume]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.source import Extent, TensorInfo


@dataclass
class ToySource:
    """Tensors by name: either extents to copy, or a function that yields pieces."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    copied: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    computed: dict[str, Callable[[], Iterator[Any]]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=lambda: {"model_type": "toy"})
    files: dict[str, Path] = field(default_factory=dict)
    weight_files: tuple[Path, ...] = ()
    label: str = "toy"

    def digest(self) -> str:
        lines = [json.dumps(self.config)]
        lines += [f"{i.name} {i.dtype} {i.shape}" for i in self.tensors.values()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return self.copied.get(name)

    def stream(self, name: str) -> Iterator[Any]:
        return self.computed[name]()

    def read(self, name: str) -> Any:
        raise AssertionError("a write never reads whole tensors")

    def copy(self, info: TensorInfo, *extents: Extent) -> None:
        self.tensors[info.name] = info
        self.copied[info.name] = extents

    def compute(self, info: TensorInfo, pieces: Callable[[], Iterator[Any]]) -> None:
        self.tensors[info.name] = info
        self.computed[info.name] = pieces

    def with_config(self, **config: Any) -> ToySource:
        return replace(self, config={**self.config, **config})


class Meter:
    """How much was being computed at once, in bytes of fp32, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def measured(self, info: TensorInfo, pieces: Iterator[Any]) -> Iterator[Any]:
        """The pieces, taken slowly; counts from the first until the last is done with."""
        with self._lock:
            self.now += 4 * info.numel
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        yield from pieces
        with self._lock:
            self.now -= 4 * info.numel


def byte_source(folder: Path, *, tensors: int = 8, nbytes: int = 1000) -> ToySource:
    """A source folder whose tensors are all copied; makes the folder if it is not there."""
    data, carried = folder / "weights.safetensors", folder / "tokenizer.json"
    if not folder.exists():
        folder.mkdir(parents=True)
        data.write_bytes(b"".join(bytes([i + 1]) * nbytes for i in range(tensors)))
        (folder / "config.json").write_text("{}")
        carried.write_text('{"merges": []}')
    source = ToySource(config={"model_type": "toy", "größe": 1}, files={"tokenizer.json": carried})
    for i in range(tensors):
        info = TensorInfo.of(f"layers.{i}.weight", "U8", (nbytes,))
        source.copy(info, Extent(data, i * nbytes, nbytes))
    return source


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def main(folder: str, out: str, shard_size: str, *flags: str) -> None:
    """Write slowly: each call copies little and sleeps, so that there is time to be interrupted."""
    from moe_compose.checkpoint.writer import Progress, write

    real = os.copy_file_range

    def slow(source: int, target: int, count: int, start: int, position: int) -> int:
        time.sleep(0.01)
        return real(source, target, min(count, 100), start, position)

    def tell(progress: Progress) -> None:
        print(progress.bytes_done, progress.bytes_total, flush=True)

    os.copy_file_range = slow
    source = byte_source(Path(folder))
    write(source, out, shard_size=int(shard_size), resume="resume" in flags, progress=tell)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
