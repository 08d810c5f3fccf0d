"""Figures of a report, as SVG that stands in the page and takes its colours from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from moe_compose.reporting.page import Html, element, joined

#: Steps of a colour.
LEVELS = 12

#: Up to so many cells each says its value when the pointer rests on it.
TOLD = 2048

_LEFT, _TOP, _PLOT = 44, 6, 720

Row = Sequence[float | None]
Points = Sequence[tuple[float, float]]


def heat_map(
    rows: Sequence[Row],
    labels: Sequence[str],
    tell: Callable[[int, int], str],
    *,
    across: str = "expert",
) -> Html:
    """A cell for every value, from -1 (cold) over 0 (nothing) to 1 (hot); None: a cross.

    Args:
        rows: values, those outside are cut.
        labels: of the rows.
        tell: what a cell says of itself, by row and column.
        across: what columns are.
    """
    columns = max(map(len, rows), default=0)
    width = min(max(_PLOT / max(columns, 1), 2.0), 26.0)
    height = min(max(480 / max(len(rows), 1), 5.0), 18.0)
    shapes = [*_shades(rows, width, height), *_crosses(rows, width, height)]
    if len(rows) * columns <= TOLD:
        shapes += _told(rows, tell, width, height)
    right, bottom = _LEFT + columns * width, _TOP + len(rows) * height
    frame = element(
        "rect",
        **{"class": "frame", "x": _LEFT, "y": _TOP},
        width=f"{columns * width:g}",
        height=f"{len(rows) * height:g}",
    )
    every = max(1, math.ceil(len(rows) * 12 / max(bottom - _TOP, 1)))
    names = [
        _text(_LEFT - 6, _TOP + (r + 0.5) * height + 4, labels[r], "end")
        for r in range(0, len(rows), every)
    ]
    step = _step(columns, width)
    numbers = [
        _text(_LEFT + (c + 0.5) * width, bottom + 14, str(c), "middle")
        for c in range(0, columns, step)
    ]
    below = _text(right, bottom + 28, across, "end")
    return _svg(right + 8, bottom + 32, frame, *shapes, *names, *numbers, below)


def _shades(rows: Sequence[Row], width: float, height: float) -> Iterator[Html]:
    """One path for all cells of a shade: a large map stays small as text."""
    shades: dict[tuple[str, int], list[str]] = {}
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            level = round(min(abs(value), 1.0) * LEVELS) if value is not None else 0
            if value is not None and level:
                x, y = _LEFT + c * width, _TOP + r * height
                box = f"M{x:.5g} {y:.5g}h{width:.4g}v{height:.4g}h-{width:.4g}z"
                shades.setdefault(("hot" if value > 0 else "cold", level), []).append(box)
    for (kind, level), boxes in sorted(shades.items()):
        opacity = f"{level / LEVELS:.2g}"
        yield element("path", d="".join(boxes), fill_opacity=opacity, **{"class": kind})


def _crosses(rows: Sequence[Row], width: float, height: float) -> Iterator[Html]:
    size = min(width, height) / 4
    found = [
        f"M{x - size:.5g} {y - size:.5g}l{2 * size:.4g} {2 * size:.4g}"
        f"m-{2 * size:.4g} 0l{2 * size:.4g}-{2 * size:.4g}"
        for r, row in enumerate(rows)
        for c, value in enumerate(row)
        if value is None
        for x, y in [(_LEFT + (c + 0.5) * width, _TOP + (r + 0.5) * height)]
    ]
    if found:
        yield element("path", d="".join(found), **{"class": "none"})


def _told(
    rows: Sequence[Row], tell: Callable[[int, int], str], width: float, height: float
) -> Iterator[Html]:
    for r, row in enumerate(rows):
        for c in range(len(row)):
            yield element(
                "rect",
                element("title", tell(r, c)),
                x=f"{_LEFT + c * width:.5g}",
                y=f"{_TOP + r * height:.5g}",
                width=f"{width:.4g}",
                height=f"{height:.4g}",
                **{"class": "cell"},
            )


def _step(columns: int, width: float) -> int:
    """Columns between two numbers, so that they do not touch."""
    return next((s for s in (1, 2, 4, 8, 16, 32, 64) if s * width >= 22), 128)


def chart(series: Mapping[str, Points], x_label: str, y_label: str, *, dots: bool = True) -> Html:
    """Lines over two axes, with a key where there are several.

    Args:
        series: name → points, in order of x.
        x_label: of the lower axis.
        y_label: of the left axis.
        dots: mark the points.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [p for points in finite.values() for p in points]
    if not every:
        return Html("")
    xs, ys = _ticks([x for x, _ in every]), _ticks([y for _, y in every])
    wide, high, left = 640.0, 220.0, 56.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return left + across * wide, _TOP + (1 - up) * high

    grid = [_text(left - 6, at(xs[0], y)[1] + 4, f"{y:g}", "end") for y in ys]
    grid += [_text(at(x, ys[0])[0], _TOP + high + 16, f"{x:g}", "middle") for x in xs]
    rules = "".join(f"M{left:g} {at(xs[0], y)[1]:.5g}h{wide:g}" for y in ys)
    drawn: list[Html] = [element("path", d=rules, **{"class": "frame"})]
    for i, points in enumerate(finite.values()):
        places = [at(*p) for p in points]
        d = "M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in places)
        shapes = [element("path", d=d, **{"class": "line"})] if len(places) > 1 else []
        if dots and len(places) <= 200:
            shapes += [element("circle", cx=f"{x:.5g}", cy=f"{y:.5g}", r=3) for x, y in places]
        drawn.append(element("g", *shapes, **{"class": f"s{i % 6}"}))
    label = _text(left + wide, _TOP + high + 32, x_label, "end")
    keys = [element("span", name, class_=f"key s{i % 6}") for i, name in enumerate(finite)]
    picture = _svg(left + wide + 20, _TOP + high + 38, *grid, *drawn, label)
    head = element("p", y_label, class_="note")
    return joined((head, picture, element("p", *keys) if len(keys) > 1 else ""))


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that span the values, about five of them."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(spread / 4))
    step *= next(f for f in (1, 2, 5, 10) if f * step * 4 >= spread * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=f"{x:.5g}", y=f"{y:.5g}", text_anchor=anchor)


def _svg(width: float, height: float, *shapes: Html) -> Html:
    """A picture that scrolls on a narrow screen: shrunk, nobody could read it."""
    picture = element(
        "svg",
        *shapes,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
    )
    return element("div", picture, class_="scroll")
