"""Statistics of experts as one picture.

From top to bottom: load by layer and expert; for each domain, how much more of it an expert gets
than of the others; and, where similarities were gathered, the cosine of the experts' outputs in one
layer, ordered by the tree of average linkage that is drawn beside it.

matplotlib, and scipy for the tree, are the optional extra `plot`.
"""

from __future__ import annotations

import base64
import html
import io
import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.copying import write_file
from moe_compose.errors import OptionError, UnsupportedError, WriteError

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

FORMATS = (".png", ".svg", ".pdf", ".html")

#: Load and specialisation are shown between 1/16 and 16 times the mean.
_DOUBLINGS = 4


def draw(
    stats: ExpertStats, path: Path, *, layer: int | None = None, overwrite: bool = False
) -> Path:
    """Draw statistics into a file.

    Args:
        stats: the statistics.
        path: `.png`, `.svg`, `.pdf`, or `.html` with the picture inside.
        layer: whose similarities are shown; by default the middle one.
        overwrite: replace a file that is there.

    Returns:
        `path`.

    Raises:
        OptionError: another kind of file, or no such layer.
        UnsupportedError: matplotlib or scipy is not installed.
        WriteError: the file is there, or cannot be written.
    """
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise OptionError(f"the picture ({path.name}) must end in {', '.join(FORMATS)}")
    if path.exists() and not overwrite:
        raise WriteError(f"{path} is there already", hint="Replace it with --overwrite.")
    figure = _figure(stats, layer)
    content = io.BytesIO()
    kind = "png" if ending == ".html" else ending[1:]
    figure.savefig(content, format=kind, dpi=150, bbox_inches="tight")
    data = content.getvalue()
    write_file(path, _page(stats, data) if ending == ".html" else data)
    return path


def _needed(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError as e:
        package = name.partition(".")[0]
        raise UnsupportedError(
            f"{what} needs {package}, which is not installed",
            hint="pip install 'moe-compose[plot]'",
        ) from e


def _figure(stats: ExpertStats, layer: int | None) -> Any:
    pictures = _needed("matplotlib.figure", "drawing")
    domains = stats.domains if len(stats.domains) > 1 else ()
    alike = bool(stats.record.sample and stats.folder is not None)
    rows = 1 + len(domains)
    heights = [max(1.2, 0.1 * len(stats.layers))] * rows
    size = (9, sum(heights) + 0.5 * rows + (5 if alike else 0))
    figure = pictures.Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(2 if alike else 1, 1, height_ratios=_ratios(heights, alike))
    upper = parts[0] if alike else parts
    axes = upper.subplots(rows, 1, squeeze=False, sharex=True)
    tables = [_load(stats), *(_special(stats, d) for d in domains)]
    titles = ["load, in units of an even one", *(f"{d}, against all domains" for d in domains)]
    for ax, table, title in zip(axes[:, 0], tables, titles, strict=True):
        shown = ax.imshow(
            table, aspect="auto", cmap="RdBu_r", vmin=-_DOUBLINGS, vmax=_DOUBLINGS, origin="upper"
        )
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_ylabel("layer", fontsize=8)
        every = max(1, len(stats.layers) // 24)
        shown_layers = list(map(str, stats.layers))[::every]
        ax.set_yticks(range(0, len(stats.layers), every), shown_layers, fontsize=6)
        bar = upper.colorbar(shown, ax=ax, pad=0.01)
        ticks = range(-_DOUBLINGS, _DOUBLINGS + 1, 2)
        bar.set_ticks(list(ticks), labels=[f"{2.0**t:g}" for t in ticks], fontsize=6)
    axes[-1, 0].set_xlabel("expert", fontsize=8)
    axes[-1, 0].tick_params(axis="x", labelsize=6)
    if alike:
        _draw_similarity(stats, parts[1], layer)
    figure.suptitle(f"{stats.record.source}, {stats.tokens():,} tokens", fontsize=11)
    return figure


def _ratios(heights: list[float], alike: bool) -> list[float]:
    return [sum(heights) + 0.5 * len(heights), 5.0] if alike else [1.0]


def _load(stats: ExpertStats) -> list[list[float]]:
    """Doublings of an even load."""
    found = []
    for layer in stats.layers:
        share = stats.load_share(layer)
        found.append([_doublings(x * len(share)) for x in share.tolist()])
    return _padded(found)


def _special(stats: ExpertStats, domain: str) -> list[list[float]]:
    """Doublings of an expert's mean share over the domains."""
    index = stats.domains.index(domain)
    rows = [stats.specialisation(layer)[index].tolist() for layer in stats.layers]
    return _padded([[_doublings(x) for x in row] for row in rows])


def _doublings(factor: float) -> float:
    return math.log2(factor) if factor > 0 else -math.inf


def _padded(rows: list[list[float]]) -> list[list[float]]:
    longest = max(map(len, rows))
    floor = -10.0 * _DOUBLINGS
    return [[max(x, floor) for x in r] + [math.nan] * (longest - len(r)) for r in rows]


def _draw_similarity(stats: ExpertStats, part: Any, layer: int | None) -> None:
    hierarchy = _needed("scipy.cluster.hierarchy", "the tree of similarities")
    distance = _needed("scipy.spatial.distance", "the tree of similarities")
    known = list(stats.layers)
    layer = known[len(known) // 2] if layer is None else layer
    cosine_EE = stats.similarity(layer).cosine_EE.double().numpy()
    tree_ax, ax = part.subplots(1, 2, gridspec_kw={"width_ratios": [1, 3]})
    apart = (1 - (cosine_EE + cosine_EE.T) / 2).clip(min=0)
    for i in range(len(apart)):
        apart[i, i] = 0
    links = hierarchy.linkage(distance.squareform(apart, checks=False), "average")
    tree = hierarchy.dendrogram(
        links, orientation="left", ax=tree_ax, no_labels=True, color_threshold=0
    )
    order = tree["leaves"]
    tree_ax.axis("off")
    shown = ax.imshow(
        cosine_EE[order][:, order], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", origin="lower"
    )
    ax.set_title(f"layer {layer}: cosine of experts' outputs", fontsize=9, loc="left")
    few = len(order) <= 64
    ax.set_yticks(range(len(order)) if few else [], order if few else [], fontsize=5)
    ax.set_xticks(range(len(order)) if few else [], order if few else [], fontsize=5, rotation=90)
    part.colorbar(shown, ax=ax, pad=0.01).ax.tick_params(labelsize=6)


def _page(stats: ExpertStats, picture: bytes) -> bytes:
    """One file that needs no other."""
    name = html.escape(stats.record.source)
    data = base64.b64encode(picture).decode()
    return (
        f'<!doctype html><meta charset="utf-8"><title>{name}</title>'
        f'<img alt="statistics of the experts of {name}" style="max-width:100%" '
        f'src="data:image/png;base64,{data}">\n'
    ).encode()
