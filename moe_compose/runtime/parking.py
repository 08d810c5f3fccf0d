"""Where activations wait while other batches run: in memory up to a budget, beyond it in files.

The hidden states of a parked batch are held by local variables of a forward that nobody may change.
What can be changed is what the tensors point to: `tensor.data` is written to a file and replaced by
nothing, and before the batch runs again it is read back, so that the batch never sees a difference.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compose.errors import CheckpointError
from moe_compose.runtime.lockstep import Call, Lane

#: Smaller tensors always stay in memory.
SMALLEST = 1 << 20


def tensors_in(found: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from tensors_in(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from tensors_in(value)


@dataclass(slots=True, eq=False)
class _Filed:
    """A tensor with a copy in a file: good as long as nobody wrote to the tensor (`version`)."""

    tensor: weakref.ref[Tensor]
    path: Path
    shape: torch.Size
    version: int
    away: bool = True


class Parking:
    """Keeps what batches hold while they wait.

    Args:
        budget: bytes that all waiting batches together may hold in memory.
        folder: an empty folder for the rest.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self._budget = budget
        self._folder = folder
        self._held: dict[int, int] = {}
        self._filed: dict[int, list[_Filed]] = {}
        self._files = 0

    def put(self, lane: int, found: Any) -> None:
        """A batch begins to wait.

        Args:
            lane: its index.
            found: tensors that it holds, nested in tuples, lists and mappings.
        """
        self._forget_dead(lane)
        known = {id(f.tensor()): f for f in self._filed.get(lane, ())}
        unique = {id(t): t for t in tensors_in(found) if _movable(t)}
        unique |= {key: t for key, f in known.items() if (t := f.tensor()) is not None}
        size = sum(t.nbytes for t in unique.values())
        if sum(self._held.values()) + size <= self._budget:
            self._held[lane] = size
            return
        for key, tensor in unique.items():
            self._send_away(lane, tensor, known.get(key))

    def take(self, lane: int) -> None:
        """A batch is about to run: all it holds is in memory again."""
        self._held.pop(lane, None)
        for filed in self._filed.get(lane, ()):
            tensor = filed.tensor()
            if tensor is not None and filed.away:
                tensor.data = _read(filed.path, filed.shape, tensor)
                filed.version, filed.away = tensor._version, False

    def waiting(self, lanes: Iterable[Lane]) -> Iterator[tuple[int, Call]]:
        """Index and call of each batch that waits for a layer; in memory while it is looked at."""
        for lane in lanes:
            assert lane.call is not None
            self.take(lane.index)
            yield lane.index, lane.call
            self.put(lane.index, (lane.call.args, lane.call.kwargs))

    def drop(self, lane: int) -> None:
        """A batch has ended."""
        self._held.pop(lane, None)
        for filed in self._filed.pop(lane, ()):
            filed.path.unlink(missing_ok=True)

    def _send_away(self, lane: int, tensor: Tensor, filed: _Filed | None) -> None:
        if filed is None or filed.version != tensor._version:
            path = filed.path if filed else self._folder / f"{lane}-{self._files}"
            if filed is None:
                self._files += 1
                filed = _Filed(weakref.ref(tensor), path, tensor.shape, tensor._version)
                self._filed.setdefault(lane, []).append(filed)
            tensor.cpu().view(torch.uint8).numpy().tofile(path)
        filed.away = True
        tensor.data = tensor.new_empty(0)
        filed.version = tensor._version

    def _forget_dead(self, lane: int) -> None:
        alive = []
        for filed in self._filed.get(lane, ()):
            if filed.tensor() is None:
                filed.path.unlink(missing_ok=True)
            else:
                alive.append(filed)
        if lane in self._filed:
            self._filed[lane] = alive


def _movable(tensor: Tensor) -> bool:
    """Whether a tensor owns all of its memory, and enough of it to be worth a file."""
    whole = tensor._base is None and tensor.is_contiguous() and tensor.ndim > 0
    return (
        whole
        and tensor.nbytes >= SMALLEST
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and not isinstance(tensor, torch.nn.Parameter)
    )


def _read(path: Path, shape: Iterable[int], like: Tensor) -> Tensor:
    whole = torch.empty(tuple(shape), dtype=like.dtype)
    with path.open("rb") as file:
        got = file.readinto(whole.view(torch.uint8).numpy())  # type: ignore[arg-type]
    if got != whole.nbytes:
        raise CheckpointError(f"a temporary file is cut short ({got} of {whole.nbytes} bytes)")
    return whole.to(like.device)
