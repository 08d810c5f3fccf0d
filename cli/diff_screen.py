"""What changed between two checkpoints, as a screen. Nothing is printed here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import compress, groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_compose.reporting.difference import STATUSES
from moe_compose.reporting.units import bytes_text, count

from .screens import facts, grid_of, title

if TYPE_CHECKING:
    from moe_compose.reporting.difference import Difference, LayerChange, Side, TensorChange

#: Tensors, and config entries, that are shown; all are in the JSON document.
MOST = 20

_STYLES = {
    "added": "green",
    "removed": "red",
    "changed": "yellow",
    "moved": "cyan",
    "copied": "cyan",
}
_EXPLAINED = (
    "moved: the same bytes under another index; copied: once more. distance: the largest ‖after − "
    "before‖ / ‖before‖ of an expert. rows: experts in both whose rows of the router are the same "
    "bytes; apart: the largest such distance of the others' rows"
)


def diff_screen(found: Difference) -> RenderableType:
    """A difference, as `moe-compose diff` shows it."""
    parts: list[RenderableType] = [
        title(f"{found.before.label} → {found.after.label}"),
        facts(list(_facts(found))),
    ]
    if found.config:
        parts += [_gap("config.json"), _inset(_config(found))]
    if found.layers:
        parts += [_gap("experts"), _inset(_experts(found.layers)), _inset(_dim(_EXPLAINED))]
    if found.tensors:
        parts += [_gap("other tensors"), _inset(_tensors(found.tensors))]
    if found.files:
        parts += [_gap("files"), facts([(s, n) for n, s in found.files.items()])]
    return Group(*parts, Text(""), _verdict(found))


def _gap(name: str) -> RenderableType:
    return Padding(title(name), (1, 0, 0, 0), expand=False)


def _inset(part: RenderableType) -> RenderableType:
    return Padding(part, (0, 0, 0, 2), expand=False)


def _dim(text: str) -> RenderableType:
    return Text(text, style="dim")


def _facts(found: Difference) -> Iterator[tuple[str, RenderableType]]:
    a, b = found.before, found.after
    rows = [
        ("family", a.model_type, b.model_type),
        ("experts", _experts_of(a), _experts_of(b)),
        ("parameters", count(a.total), count(b.total)),
        ("active", count(a.active or a.total), count(b.active or b.total)),
        ("bytes", bytes_text(a.bytes), bytes_text(b.bytes)),
        ("tensors", str(a.tensors), str(b.tensors)),
    ]
    for label, before, after in rows:
        yield label, f"{before}" if before == after else f"{before} → {after}"
    total = sum(found.experts.values())
    said = [f"{n} {status}" for status, n in sorted(found.experts.items(), key=lambda x: -x[1])]
    if total:
        yield "all experts", ", ".join(said)
    yield "others", f"{found.same_tensors} tensors and {found.same_files} files are the same"
    yield from (("note" if i == 0 else "", note) for i, note in enumerate(found.notes))


def _experts_of(side: Side) -> str:
    if side.experts is None:
        return "none"
    return f"{side.experts}, {side.top_k} per token, in {side.sparse_layers} layers"


def _config(found: Difference) -> RenderableType:
    rows: list[Sequence[RenderableType]] = [
        (Text(c.status, style=_STYLES[c.status]), c.name, _value(c.before, c.after))
        for c in found.config[:MOST]
    ]
    return Group(grid_of(("", "entry", "value"), rows), *_more(len(found.config)))


def _value(before: Any, after: Any) -> str:
    sides = (_short(x) for x in (before, after) if x is not None)
    return " → ".join(sides) or "null"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _more(total: int) -> list[RenderableType]:
    return [_dim(f"and {total - MOST} more, all in --json")] if total > MOST else []


def _experts(layers: Sequence[LayerChange]) -> RenderableType:
    """A line for neighbours with the same figures; a column where there is something to say."""
    head = ("layers", *STATUSES, "distance", "rows", "apart")
    rows: list[tuple[str, ...]] = []
    usual = _stem(layers[0])
    for (stem, shown), alike in groupby(layers, key=lambda x: (_stem(x), _row(x))):
        numbers = [layer.block.rpartition(".")[2] for layer in alike]
        name = numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        rows.append((name if stem == usual else f"{stem}.{name}", *shown))
    said = [any(row[i] != "–" for row in rows) for i in range(len(head))]
    return grid_of(tuple(compress(head, said)), [tuple(compress(row, said)) for row in rows], 1)


def _stem(layer: LayerChange) -> str:
    """What stands before the layer's number: others in blocks of multi-token prediction."""
    return layer.block.rpartition(".")[0]


def _row(layer: LayerChange) -> tuple[str, ...]:
    """A layer's figures; neighbours with the same ones are shown as one."""
    counts = layer.counts
    kept, both = layer.rows
    shown = [str(counts[s] or "–") for s in STATUSES]
    rows = f"{kept} of {both}" if both else "–"
    return (*shown, _distance(layer.worst()), rows, _distance(layer.worst_row()))


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def _tensors(tensors: Sequence[TensorChange]) -> RenderableType:
    """The farthest first."""
    far = sorted(tensors, key=lambda t: -(t.distance or 0.0))
    rows: list[Sequence[RenderableType]] = [
        (
            Text(t.status, style=_STYLES[t.status]),
            t.name,
            " → ".join(dict.fromkeys(x for x in (t.before, t.after) if x)),
            _distance(t.distance),
        )
        for t in far[:MOST]
    ]
    table = grid_of(("", "tensor", "dtype and shape", "distance"), rows, 3)
    return Group(table, *_more(len(tensors)))


def _verdict(found: Difference) -> RenderableType:
    if found.same:
        return Text("✓ the same", "bold green")
    what = [
        ("config", bool(found.config)),
        ("experts", not found.same_experts),
        ("router rows", not found.same_rows),
        ("other tensors", bool(found.tensors)),
        ("files", bool(found.files)),
    ]
    return Text(f"different: {', '.join(name for name, differs in what if differs)}", "bold")
