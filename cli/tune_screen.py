"""What `moe-compose tune` found, as a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from .screens import grid_of

if TYPE_CHECKING:
    from moe_compose.kernels.configs import Tile
    from moe_compose.kernels.tuned import Entry


def tune_screen(entries: Sequence[Entry]) -> RenderableType:
    """One line an entry; `128×64 w8 s4` is 128 columns, steps of 64, 8 warps, 4 stages."""
    head = ("D,F,E,K", "rows", "first", "second", "tokens", "µs", "table µs", "tried")
    return grid_of(head, [_row(entry) for entry in entries], right=4)


def _row(entry: Entry) -> list[str]:
    config = entry.config
    return [
        f"{entry.model},{entry.width},{entry.experts},{entry.top_k}",
        str(config.rows),
        _tile(config.first),
        _tile(config.second),
        str(entry.tokens),
        f"{entry.seconds * 1e6:.0f}",
        f"{entry.table_seconds * 1e6:.0f}",
        str(entry.tried),
    ]


def _tile(tile: Tile) -> str:
    return f"{tile.n}×{tile.k} w{tile.warps} s{tile.stages}"
