"""A sweep as a picture: KL to the original over the bytes of each candidate, a line a criterion.

matplotlib is the optional extra `plot`.
"""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.copying import write_file
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.tradeoff.options import BASELINE

if TYPE_CHECKING:
    from moe_compose.tradeoff.result import Sweep

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> Any:
    """What draws, if it can draw this file.

    Raises:
        OptionError: another kind of file.
        UnsupportedError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"the picture ({path.name}) must end in {', '.join(FORMATS)}")
    try:
        return import_module("matplotlib.figure")
    except ImportError as e:
        raise UnsupportedError(
            "drawing needs matplotlib, which is not installed",
            hint="pip install 'moe-compose[plot]'",
        ) from e


def draw_sweep(found: Sweep, path: Path) -> Path:
    """Draw a sweep into a file, replacing it; returns `path`.

    Raises:
        OptionError, UnsupportedError: as `check_picture`.
        WriteError: it cannot be written.
    """
    figure = check_picture(path).Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for criterion in dict.fromkeys(c.criterion for c in found.candidates):
        own = [c for c in found.candidates if c.criterion == criterion]
        x = [found.bytes / 1e9, *(c.bytes / 1e9 for c in own)]
        style = {"linestyle": ":", "color": "grey"} if criterion == BASELINE else {}
        ax.plot(x, [0.0, *(c.kl for c in own)], marker="o", label=criterion, **style)
    for c, word in ((found.knee, "knee"), (found.chosen, "chosen")):
        if c is not None:
            text = f"{word}: {c.criterion} {c.keep}"
            ax.annotate(text, (c.bytes / 1e9, c.kl), (8, 8), textcoords="offset points")
    if found.max_kl is not None:
        ax.axhline(found.max_kl, linewidth=0.8, color="black", linestyle="--")
    ax.set_xlabel("gigabytes on disk")
    ax.set_ylabel("KL to the original, nats per token")
    refitted = any(c.refitted for c in found.candidates)
    ax.set_title(f"{found.source}{', refitted' if refitted else ''}", loc="left", fontsize=10)
    ax.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=150)
    write_file(path, content.getvalue())
    return path
