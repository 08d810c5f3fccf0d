"""`Destination`: what a write into a folder would do, decided before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_compose.checkpoint.sharding import Shard
from moe_compose.checkpoint.write_state import WriteState


@dataclass(frozen=True, slots=True)
class Destination:
    """What a write into a folder would do.

    Attributes:
        folder: where.
        shards: all files of weights.
        kept: names of those that are complete and stay.
        finished: everything is there; nothing is left to do.
        removed: names of files that are taken away first, in that order.
        state: what the write records of itself.
        config: the bytes of `config.json`.
        index: the bytes of the index; None for a single shard.
    """

    folder: Path
    shards: tuple[Shard, ...]
    kept: frozenset[str]
    finished: bool
    removed: tuple[str, ...]
    state: WriteState
    config: bytes
    index: bytes | None

    @property
    def bytes_total(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bytes_kept(self) -> int:
        """Bytes of the tensors that are there already."""
        return sum(shard.nbytes for shard in self.shards if shard.name in self.kept)
