"""Tile sizes of the backward's products, by accelerator and rows per expert.

As in `configs.py`: a table, every entry of which is compiled in the tests, and none of which has
been tuned on a device yet. Where its tiles have other rows than the forward's, the backward cuts
the sorted pairs again (one small launch).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_compose.kernels.configs import Tile


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """How the backward of one layer is cut into programs.

    Attributes:
        rows: of one tile of the products over rows in slot order.
        hidden: of dh' = W_2ᵀ dO; `n` columns of dh', and of z's gate and up.
        input: of dX = W_1ᵀ dz.
        weight: of the weight gradients; `k` is the step along an expert's rows.
        weight_rows: rows of a weight gradient's tile, `weight.n` its columns.
        group: as in `Config`.
        aligned: only for sizes that 16 divides.
    """

    rows: int
    hidden: Tile
    input: Tile
    weight: Tile
    weight_rows: int
    group: int = 8
    aligned: bool = False

    def fits(self, model: int, width: int) -> bool:
        """Whether a layer of these sizes, D and F, may be cut so."""
        return not self.aligned or model % 16 == width % 16 == 0


def _entry(
    rows: int,
    hidden: Tile,
    input: Tile,
    weight: Tile,
    weight_rows: int = 128,
    *,
    aligned: bool = False,
) -> BackwardConfig:
    return BackwardConfig(
        rows=rows,
        hidden=hidden,
        input=input,
        weight=weight,
        weight_rows=weight_rows,
        aligned=aligned,
    )


def _tile(n: int, k: int, warps: int, stages: int) -> Tile:
    return Tile(n=n, k=k, warps=warps, stages=stages)


Table = tuple[tuple[int, BackwardConfig], ...]

#: 227 KiB of shared memory. Rows of odd length are loaded piecemeal, which takes registers.
_LARGE_SHARED: Table = (
    (
        256,
        _entry(128, _tile(128, 64, 8, 3), _tile(128, 64, 8, 4), _tile(128, 64, 8, 3), aligned=True),
    ),
    (256, _entry(128, _tile(64, 64, 8, 3), _tile(128, 64, 8, 3), _tile(128, 64, 8, 3))),
    (33, _entry(64, _tile(64, 64, 4, 4), _tile(128, 64, 4, 4), _tile(128, 64, 8, 3))),
    (0, _entry(16, _tile(64, 128, 4, 4), _tile(64, 128, 4, 4), _tile(128, 16, 8, 3))),
)

#: 99 KiB.
_SMALL_SHARED: Table = (
    (256, _entry(128, _tile(64, 64, 8, 3), _tile(128, 64, 8, 2), _tile(128, 32, 8, 3))),
    (33, _entry(64, _tile(64, 64, 4, 3), _tile(128, 64, 4, 2), _tile(128, 32, 8, 3))),
    (0, _entry(16, _tile(64, 64, 4, 3), _tile(64, 64, 4, 3), _tile(128, 16, 8, 3))),
)

#: arch → (fewest rows per expert, configuration), most rows first; 2 bytes an element.
HALF: dict[str, Table] = {
    "sm_80": (
        (256, _entry(128, _tile(64, 64, 8, 3), _tile(128, 64, 8, 3), _tile(128, 32, 8, 3))),
        (33, _entry(64, _tile(64, 64, 4, 3), _tile(128, 64, 4, 3), _tile(128, 32, 8, 3))),
        (0, _entry(16, _tile(64, 128, 4, 3), _tile(64, 128, 4, 3), _tile(128, 16, 8, 3))),
    ),
    "sm_90": _LARGE_SHARED,
    "sm_100": _LARGE_SHARED,
    "sm_120": _SMALL_SHARED,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "gfx942": (
        (256, _entry(128, _tile(64, 64, 8, 2), _tile(128, 64, 8, 2), _tile(128, 32, 8, 2))),
        (33, _entry(64, _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(128, 32, 8, 2))),
        (0, _entry(16, _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(128, 16, 8, 2))),
    ),
    "interpreter": (
        (0, _entry(64, _tile(128, 128, 4, 1), _tile(128, 128, 4, 1), _tile(128, 64, 4, 1))),
    ),
}

#: 4 bytes an element, without tensor cores: for checks, not for speed.
SINGLE: Table = (
    (33, _entry(64, _tile(32, 16, 4, 2), _tile(32, 16, 4, 2), _tile(32, 16, 4, 2), 32)),
    (0, _entry(16, _tile(32, 32, 4, 2), _tile(32, 32, 4, 2), _tile(32, 16, 4, 2), 32)),
)


def backward_config_for(
    arch: str, rows_per_expert: float, bytes_per_element: int, model: int, width: int
) -> BackwardConfig | None:
    """The entry for a layer of sizes D (`model`) and F (`width`); None for an unknown `arch`.

    Example:
        >>> backward_config_for("sm_90", 1024, 2, 2048, 768).rows
        128
    """
    if arch not in HALF:
        return None
    table = SINGLE if bytes_per_element == 4 and arch != "interpreter" else HALF[arch]
    return next(c for n, c in table if rows_per_expert >= n and c.fits(model, width))
