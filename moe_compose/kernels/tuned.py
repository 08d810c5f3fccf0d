"""Configurations that were measured on a device: their file, and how it comes before the table.

`load_configs` changes what `config_for` answers in this process, and so the order of sums; nothing
else does, and no environment variable. The hook and `validate` take what is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_compose.errors import OptionError
from moe_compose.kernels.configs import HALF, MEASURED, Config, Tile

log = logging.getLogger(__name__)

KIND = "moe-compose kernel configurations"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was fastest for one layer and number of tokens.

    Attributes:
        model, width, experts, top_k: D, F, E, K.
        tokens: T.
        element_bytes: of weights and tokens.
        seconds: of the whole layer, the median.
        table_seconds: of the same with the table's configuration.
        error: ‖ours − exact‖ / ‖exact‖, exact being the reference in fp32 or more.
        tried: configurations that ran and were exact.
        config: the fastest of them.
    """

    model: int
    width: int
    experts: int
    top_k: int
    tokens: int
    element_bytes: int
    seconds: float
    table_seconds: float
    error: float
    tried: int
    config: Config

    @property
    def rows_per_expert(self) -> float:
        """The mean."""
        return self.tokens * self.top_k / self.experts


def document(entries: Sequence[Entry], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds; `facts` say where it was measured, `arch` among them."""
    return {"kind": KIND, "format": 1, **facts, "entries": [asdict(entry) for entry in entries]}


def load_configs(path: str | Path) -> int:
    """Use configurations that `moe-compose tune` wrote, for layers of the sizes it measured.

    What an earlier call loaded for the same sizes is replaced. A layer takes the entry with the
    nearest rows per expert (T·K / E), by ratio.

    Args:
        path: the file.

    Returns:
        How many entries it has.

    Raises:
        OptionError: it is no such file, or has entries that no kernel can be cut by.

    Example:
        >>> load_configs("h200.json")  # doctest: +SKIP
        16
    """
    found, arch = _read(Path(path))
    fresh: dict[tuple[str, int, int, int], list[tuple[float, Config]]] = {}
    for entry in found:
        key = (arch, entry.element_bytes, entry.model, entry.width)
        fresh.setdefault(key, []).append((entry.rows_per_expert, entry.config))
    MEASURED.update(fresh)
    log.info("%d measured configurations for %s loaded from %s", len(found), arch, path)
    return len(found)


def unload_configs() -> None:
    """Go back to the table."""
    MEASURED.clear()


def _read(path: Path) -> tuple[list[Entry], str]:
    hint = "Write one with moe-compose tune --output FILE.json."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}", hint=hint) from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise OptionError(f"{path} holds no kernel configurations", hint=hint)
    arch = document.get("arch")
    if document.get("format") != 1 or arch not in HALF:
        raise OptionError(
            f"{path} is of a format ({document.get('format')}) or for an accelerator ({arch}) that "
            "this version does not know",
            hint=hint,
        )
    entries, problems = [], []
    for i, given in enumerate(document.get("entries", [])):
        try:
            entries.append(_entry(given))
        except (TypeError, KeyError, ValueError) as error:
            problems.append(f"entries.{i}: {error}")
    if problems:
        raise OptionError(f"{path} has entries that cannot be used", problems=problems, hint=hint)
    return entries, str(arch)


def _entry(given: dict[str, Any]) -> Entry:
    cut = dict(given["config"])
    for name in ("first", "second"):
        cut[name] = Tile(**cut[name])
    entry = Entry(**{**given, "config": Config(**cut)})
    counts = [entry.model, entry.width, entry.experts, entry.top_k, entry.tokens]
    counts += [entry.element_bytes, entry.config.group]
    powers = [entry.config.rows]
    for tile in (entry.config.first, entry.config.second):
        counts.append(tile.stages)
        powers += [tile.n, tile.k, tile.warps]
    if not all(isinstance(n, int) and n > 0 for n in counts + powers):
        raise ValueError("sizes must be positive whole numbers")
    if (
        any(n & (n - 1) for n in powers)
        or min(entry.config.rows, *powers[1::3], *powers[2::3]) < 16
    ):
        raise ValueError("rows, n and k must be powers of two, 16 or more; warps a power of two")
    if not entry.config.fits(entry.model, entry.width):
        raise ValueError("its tiles are for sizes that they divide, and do not divide these")
    return entry
