"""Tile sizes of the two matrix products, by accelerator and rows per expert.

A table, not a search: `triton.autotune` needs a driver, so what it would choose could not be
compiled and checked where there is none. Every entry is compiled in the tests, and refused when it
spills or exceeds the accelerator's shared memory. None has been tuned on a device yet.
"""

from __future__ import annotations

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


def _same(
    rows: int, n: int, k: int, warps: int, stages: int, *, second_n: int = 0, even: bool = False
) -> Config:
    first = Tile(n=n, k=k, warps=warps, stages=stages)
    second = Tile(n=second_n or n, k=k, warps=warps, stages=stages)
    return Config(rows=rows, first=first, second=second, even=even)


#: arch → (fewest rows per expert, configuration), most rows first; 2 bytes an element.
HALF: dict[str, tuple[tuple[int, Config], ...]] = {
    "sm_80": (
        (256, _same(128, 64, 64, 8, 3, second_n=128)),
        (33, _same(64, 64, 64, 4, 3)),
        (0, _same(16, 64, 128, 4, 3)),
    ),
    "sm_90": (
        (256, _same(128, 128, 64, 8, 3, second_n=256, even=True)),
        (33, _same(64, 64, 64, 4, 4, second_n=128)),
        (0, _same(16, 64, 128, 4, 4)),
    ),
    "gfx942": (
        (256, _same(128, 64, 64, 8, 2, second_n=128)),
        (33, _same(64, 64, 64, 4, 2)),
        (0, _same(16, 64, 64, 4, 2)),
    ),
    "interpreter": ((0, _same(64, 128, 128, 4, 1)),),
}

#: 4 bytes an element, without tensor cores: for checks, not for speed.
SINGLE = ((33, _same(64, 32, 16, 4, 2)), (0, _same(16, 32, 32, 4, 2)))


def arch_of(device: torch.device) -> str:
    """The table's name for `device`: `sm_90`, `gfx942`; `interpreter` for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def config_for(
    arch: str, rows_per_expert: float, bytes_per_element: int, model: int, width: int
) -> Config | None:
    """The entry for a layer of sizes D (`model`) and F (`width`); None for an unknown `arch`.

    No other card takes the entry of its major version: shared memory differs within one (sm_80
    163 KiB, sm_86 and sm_89 99 KiB).

    Example:
        >>> config_for("sm_90", 1024, 2, 2048, 768).rows
        128
    """
    if arch not in HALF:
        return None
    table = SINGLE if bytes_per_element == 4 and arch != "interpreter" else HALF[arch]
    fitting = (c for least, c in table if rows_per_expert >= least and c.fits(model, width))
    return next(fitting)
