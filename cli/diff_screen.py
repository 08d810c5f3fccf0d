"""What changed between two checkpoints, as a screen. Nothing is printed here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import compress, groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_compose.reporting.difference import STATUSES
from moe_compose.reporting.units import bytes_text, count

from .screens import facts, grid_of, inset, listed, title

if TYPE_CHECKING:
    from moe_compose.reporting.difference import Difference, LayerChange, Side, TensorChange

#: Tensors, and config entries, that are shown; all are in the JSON document.
MOST = 20

#: The number of a layer.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

_STYLES = {"added": "green", "removed": "red", "changed": "magenta", "moved": "", "copied": ""}
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
        parts += [_gap("config.json"), inset(_config(found))]
    if found.layers:
        parts += [_gap("experts"), inset(_experts(found.layers)), inset(_dim(_EXPLAINED))]
    if found.tensors:
        parts += [_gap("other tensors"), inset(_tensors(found.tensors))]
    if found.files:
        parts += [_gap("files"), facts([(s, n) for n, s in found.files.items()])]
    return Group(*parts, Text(""), _verdict(found))


def _gap(name: str) -> RenderableType:
    return Padding(title(name), (1, 0, 0, 0), expand=False)


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
        ("tensors", f"{a.tensors:,}", f"{b.tensors:,}"),
    ]
    for label, before, after in rows:
        yield label, f"{before}" if before == after else f"{before} → {after}"
    total = sum(found.experts.values())
    said = [f"{n:,} {status}" for status, n in sorted(found.experts.items(), key=lambda x: -x[1])]
    if total:
        yield "all experts", ", ".join(said)
    yield "others", f"{found.same_tensors:,} tensors and {found.same_files} files are the same"
    yield from listed("note", found.notes)


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
    """A line for neighbours with the same figures, of many layers also for those that differ in the
    distances only; a column where there is something to say.
    """
    head = ("layers", *STATUSES, "rows", "distance", "apart")
    rows: list[tuple[str, ...]] = []
    usual, many = _stem(layers[0]), len(layers) > MOST
    key = _counts if many else lambda x: (*_counts(x), *_distances([x]))
    for (stem, _), alike in groupby(layers, key=lambda x: (_stem(x), key(x))):
        found = list(alike)
        numbers = [layer.block.rpartition(".")[2] for layer in found]
        name = numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        shown = (*_counts(found[0]), *_distances(found))
        rows.append((name if stem == usual else f"{stem}.{name}", *shown))
    said = [any(row[i] != "–" for row in rows) for i in range(len(head))]
    return grid_of(tuple(compress(head, said)), [tuple(compress(row, said)) for row in rows], 1)


def _stem(layer: LayerChange) -> str:
    """What stands before the layer's number: others in blocks of multi-token prediction."""
    return layer.block.rpartition(".")[0]


def _counts(layer: LayerChange) -> tuple[str, ...]:
    """How many experts there are of each status, and how many rows went with theirs."""
    counts = layer.counts
    kept, both = layer.rows
    rows = f"{kept} of {both}" if both else "–"
    return (*(str(counts[s] or "–") for s in STATUSES), rows)


def _distances(layers: Sequence[LayerChange]) -> tuple[str, str]:
    """The largest of experts, and of rows."""
    found = [[x.worst() for x in layers], [x.worst_row() for x in layers]]
    most = [max((d for d in each if d is not None), default=None) for each in found]
    return _distance(most[0]), _distance(most[1])


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def _tensors(tensors: Sequence[TensorChange]) -> RenderableType:
    """The farthest first; what is the same in several layers as one."""
    groups: dict[tuple[str, ...], list[TensorChange]] = {}
    for t in tensors:
        key = (t.status, _NUMBER.sub("*", t.name, count=1), t.before or "", t.after or "")
        groups.setdefault(key, []).append(t)
    far = sorted(groups.items(), key=lambda x: -_farthest(x[1]))
    rows: list[Sequence[RenderableType]] = [
        (
            Text(status, style=_STYLES[status]),
            f"{pattern if len(alike) > 1 else alike[0].name}\n{_shapes(before, after)}",
            _layers_of(alike) if len(alike) > 1 else "",
            _distance(_farthest(alike) or None),
        )
        for (status, pattern, before, after), alike in far[:MOST]
    ]
    head = ("", "tensor, dtype and shape", "layers", "distance")
    return Group(grid_of(head, rows, 3), *_more(len(groups)))


def _farthest(tensors: Sequence[TensorChange]) -> float:
    return max(t.distance or 0.0 for t in tensors)


def _layers_of(tensors: Sequence[TensorChange]) -> str:
    """`0 to 4`, or how many where some between are not among them."""
    numbers = sorted(int(found[0]) for t in tensors if (found := _NUMBER.search(t.name)))
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]} to {numbers[-1]}"
    return f"{len(numbers)} of them"


def _shapes(before: str, after: str) -> str:
    """`F32 [4, 8] → [2, 8]`: a dtype that stays is said once."""
    if not before or not after or before == after:
        return before or after
    same = before.partition(" ")[0] == after.partition(" ")[0]
    return f"{before} → {after.partition(' ')[2] if same else after}"


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
