"""Tile sizes of the two matrix products, by accelerator and rows per expert.

A table, not a search: `triton.autotune` needs a driver, so what it would choose could not be
compiled and checked where there is none. Every entry is compiled in the tests, and refused when it
spills or exceeds the accelerator's shared memory. None has been tuned on a device yet; `tuned.py`
puts what was measured on one before the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One product's tile.

    Attributes:
        n, k: columns of the output, and the step along the reduction. In the first product of gated
            experts `n` columns of gate *and* of up.
        warps, stages: threads / 32 (64 on AMD), and depth of the software pipeline.
    """

    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one layer is cut into programs.

    Attributes:
        rows: of one tile; both products share the schedule.
        first, second: the products' tiles.
        group: tiles of rows that pass over the columns together, so that they share cache.
        even: only for sizes that the tiles divide; with masks the registers don't suffice.
    """

    rows: int
    first: Tile
    second: Tile
    group: int = 8
    even: bool = False

    def fits(self, model: int, width: int) -> bool:
        """Whether a layer of these sizes, D and F, may be cut so."""
        into = (self.first.k, self.second.n, self.first.n, self.second.k)
        sizes = (model, model, width, width)
        return not self.even or all(size % n == 0 for size, n in zip(sizes, into, strict=True))


def _config(
    rows: int,
    first: tuple[int, int, int, int],
    second: tuple[int, int, int, int],
    *,
    even: bool = False,
) -> Config:
    """Tiles as `(n, k, warps, stages)`."""
    tiles = [Tile(n=n, k=k, warps=warps, stages=stages) for n, k, warps, stages in (first, second)]
    return Config(rows=rows, first=tiles[0], second=tiles[1], even=even)


Table = tuple[tuple[int, Config], ...]

#: arch → bytes of shared memory that one program may have.
SHARED = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}

#: Cards whose programs may have 99 KiB of shared memory: GeForce RTX 30, 40 and 50.
_CONSUMER: Table = (
    (256, _config(128, (64, 32, 8, 4), (128, 32, 8, 4))),
    (33, _config(64, (64, 64, 4, 3), (64, 64, 4, 3))),
    (0, _config(16, (64, 64, 4, 3), (64, 128, 4, 3))),
)

#: arch → (fewest rows per expert, configuration), most rows first; 2 bytes an element.
HALF: dict[str, Table] = {
    "sm_80": (
        (256, _config(128, (64, 64, 8, 3), (128, 64, 8, 3))),
        (33, _config(64, (64, 64, 4, 3), (64, 64, 4, 3))),
        (0, _config(16, (64, 128, 4, 3), (64, 128, 4, 3))),
    ),
    "sm_86": _CONSUMER,
    "sm_89": _CONSUMER,
    "sm_90": (
        (256, _config(128, (128, 64, 8, 4), (256, 64, 8, 4), even=True)),
        (256, _config(128, (64, 64, 8, 3), (128, 64, 8, 3))),
        (33, _config(64, (64, 64, 4, 3), (128, 64, 4, 3))),
        (0, _config(16, (64, 128, 4, 4), (64, 128, 4, 4))),
    ),
    "sm_100": (
        (256, _config(128, (128, 64, 8, 4), (256, 64, 8, 4), even=True)),
        (256, _config(128, (64, 64, 8, 3), (128, 64, 8, 3))),
        (33, _config(64, (64, 64, 4, 4), (128, 64, 4, 4))),
        (0, _config(16, (64, 128, 4, 4), (64, 128, 4, 4))),
    ),
    "sm_120": _CONSUMER,
    "gfx942": (
        (256, _config(128, (128, 64, 8, 2), (256, 64, 8, 2))),
        (33, _config(64, (64, 64, 4, 2), (64, 64, 4, 2))),
        (0, _config(16, (64, 64, 4, 2), (64, 64, 4, 2))),
    ),
    # Its time is per tile: large ones for large layers, few rows where experts have few.
    "interpreter": (
        (17, _config(64, (256, 256, 4, 1), (256, 256, 4, 1), even=True)),
        (17, _config(64, (128, 128, 4, 1), (128, 128, 4, 1))),
        (0, _config(16, (256, 256, 4, 1), (256, 256, 4, 1), even=True)),
        (0, _config(16, (128, 128, 4, 1), (128, 128, 4, 1))),
    ),
}

#: 4 bytes an element, without tensor cores: for checks, not for speed.
SINGLE: Table = (
    (33, _config(64, (32, 16, 4, 2), (32, 16, 4, 2))),
    (0, _config(16, (32, 32, 4, 2), (32, 32, 4, 2))),
)


def arch_of(device: torch.device) -> str:
    """The table's name for `device`: `sm_90`, `gfx942`; `interpreter` for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


#: (arch, bytes of an element, D, F) → (rows per expert, configuration), as measured on a device.
#: Filled by `tuned.load_configs`, and by nothing else.
MEASURED: dict[tuple[str, int, int, int], list[tuple[float, Config]]] = {}


def config_for(
    arch: str, rows_per_expert: float, bytes_per_element: int, model: int, width: int
) -> Config | None:
    """The entry for a layer of sizes D (`model`) and F (`width`); None for an unknown `arch`.

    What was measured for these sizes comes first, at the nearest rows per expert. No card takes the
    entry of another of its major version: shared memory differs within one (sm_80 163 KiB, sm_86
    and sm_89 99 KiB).

    Example:
        >>> config_for("sm_90", 1024, 2, 2048, 768).rows
        128
    """
    if arch not in HALF:
        return None
    if measured := MEASURED.get((arch, bytes_per_element, model, width)):
        rows = max(rows_per_expert, 1e-6)
        return min(measured, key=lambda entry: abs(math.log(entry[0] / rows)))[1]
    return table_entry(arch, rows_per_expert, bytes_per_element, model, width)


def table_entry(
    arch: str, rows_per_expert: float, bytes_per_element: int, model: int, width: int
) -> Config:
    """The entry of the table alone; `arch` is one of its keys."""
    table = SINGLE if bytes_per_element == 4 and arch != "interpreter" else HALF[arch]
    fitting = (c for least, c in table if rows_per_expert >= least and c.fits(model, width))
    return next(fitting)
