"""The part of a report that documents beside a checkpoint fill: what pruning, merging, refitting, a
search of routers and training said of themselves; and a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.reporting.figures import Points, Row, chart, heat_map
from moe_compose.reporting.loose import (
    at,
    by_layer,
    entries,
    items,
    number,
    pretty,
    said,
    short,
    whole,
)
from moe_compose.reporting.page import Html, element, facts, figure, folded, note, section, table
from moe_compose.reporting.units import bytes_text
from moe_compose.surgery.history import document, read_json
from moe_compose.surgery.plan import Plan

#: No map has more columns, whatever a document says.
_MOST_EXPERTS = 4096


def document_sections(source: TensorSource) -> Iterator[Html]:
    """A section for each document that is there; one that cannot be read says so."""
    own = source.reports if isinstance(source, Plan) else {}
    for name, (title, show) in _DOCUMENTS.items():
        try:
            path = None if name in own else document(source, name)
            found = own[name] if name in own else read_json(path, source.label) if path else None
        except CheckpointError as error:
            yield section(title, note(error.message))
            continue
        if isinstance(found, Mapping):
            yield section(title, *show(found), _raw(name, found))


def _raw(name: str, found: Any) -> Html:
    return folded(name, element("pre", pretty(found)))


def _scalars(found: Mapping[str, Any]) -> Html:
    """The entries that a line can say."""
    rows = [(k.replace("_", " "), short(v)) for k, v in found.items() if _line(v)]
    return facts(rows)


def _line(value: Any) -> bool:
    if isinstance(value, list | Mapping):
        each = value.values() if isinstance(value, Mapping) else value
        return 0 < len(value) <= 12 and not any(isinstance(v, list | Mapping) for v in each)
    return value is not None


def _pruning(found: Mapping[str, Any]) -> Iterator[Html]:
    """Who stayed and who went, by their rank."""
    yield facts([("criterion", said(found.get("criterion"))), ("of", short(found.get("of")))])
    kept = {layer: _ids(ids) for layer, ids in by_layer(found.get("kept"))}
    gone = {
        layer: _ids([at(e, "expert") for e in rows if isinstance(e, Mapping)])
        for layer, rows in by_layer(found.get("removed"))
        if isinstance(rows, list)
    }
    rows: list[Row] = []
    for layer, ids in kept.items():
        away = gone.get(layer, set())
        size = max(ids | away, default=-1) + 1
        rows.append([None if e in away else 0.5 if e in ids else 0.0 for e in range(size)])
    labels = [str(layer) for layer in kept]

    def tell(r: int, c: int) -> str:
        return f"layer {labels[r]}, expert {c}: {'removed' if rows[r][c] is None else 'kept'}"

    if rows:
        yield figure("Kept (filled) and removed (crosses)", heat_map(rows, labels, tell))


def _ids(value: Any) -> set[int]:
    found = (whole(e) for e in (value if isinstance(value, list) else []))
    return {e for e in found if e is not None and e < _MOST_EXPERTS}


def _merging(found: Mapping[str, Any]) -> Iterator[Html]:
    yield _scalars(found)
    rows = []
    for layer, groups in by_layer(found.get("layers")):
        members = [items(g, "experts") for g in groups] if isinstance(groups, list) else []
        merged = [f"{{{said(ids)}}}" for ids in members if len(ids) > 1]
        rows.append((str(layer), str(len(members)), short(", ".join(merged), 400) or "–"))
    yield table(("layer", "groups", "of more than one"), rows)


def _refit(found: Mapping[str, Any]) -> Iterator[Html]:
    """Whatever figures its layers have."""
    yield _scalars(found)
    layers = [(i, x) for i, x in by_layer(found.get("layers")) if isinstance(x, Mapping)]
    names = [n for n in dict.fromkeys(n for _, x in layers for n in x) if _numeric(layers, n)]
    rows = [(str(i), *(short(x.get(n)) for n in names)) for i, x in layers]
    yield table(("layer", *(n.replace("_", " ") for n in names)), rows, right=0)


def _numeric(layers: list[tuple[int, Mapping[str, Any]]], name: str) -> bool:
    return any(number(x.get(name)) is not None for _, x in layers)


def _search(found: Mapping[str, Any]) -> Iterator[Html]:
    """Held-out loss by length of the rows."""
    yield _scalars({k: v for k, v in found.items() if k not in ("scales", "losses")})
    series: dict[str, list[tuple[float, float]]] = {}
    for scale, losses in zip(items(found, "scales"), items(found, "losses"), strict=False):
        for domain, loss in entries(losses).items():
            _add(series.setdefault(domain, []), scale, loss)
    yield chart(series, "length of a router row", "held-out loss, nats per token")


def _training(found: Mapping[str, Any]) -> Iterator[Html]:
    if "layers" in found:  # trained one by one
        yield from _refit(found)
        return
    best, start = entries(found, "best"), entries(found, "start")
    loss = f"{said(start.get('loss'))} → {said(best.get('loss'))} nats per token"
    yield facts([("held-out loss", f"{loss}, best at step {said(best.get('step'))}")])
    losses: list[tuple[float, float]] = []
    for step, value in enumerate(items(found, "losses"), 1):
        _add(losses, step, value)
    yield chart({"training": losses}, "step", str(found.get("loss") or "loss"), dots=False)
    held: dict[str, list[tuple[float, float]]] = {"all": []}
    for e in items(found, "evaluations"):
        _add(held["all"], at(e, "step"), at(e, "loss"))
        for domain, value in entries(e, "domains").items():
            _add(held.setdefault(domain, []), at(e, "step"), value)
    yield chart(held, "step", "held-out loss, nats per token")
    yield _scalars({k: v for k, v in found.items() if k not in ("best", "start", "loss")})


def _tried(found: Mapping[str, Any]) -> Iterator[Html]:
    yield _scalars(found)
    yield from _candidates(items(found, "tried"))


def _add(points: list[tuple[float, float]], x: Any, y: Any) -> None:
    a, b = number(x), number(y)
    if a is not None and b is not None:
        points.append((a, b))


#: File → heading, and what shows it.
_DOCUMENTS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Iterator[Html]]]] = {
    "pruning.json": ("Pruning", _pruning),
    "merging.json": ("Merging", _merging),
    "refit.json": ("Refit", _refit),
    "routing_search.json": ("Search of router rows", _search),
    "training.json": ("Training", _training),
    "max_kl.json": ("Smallest within a limit of KL", _tried),
    "shared_parameters.json": ("Shared parameters", lambda found: iter([_scalars(found)])),
}


def sweep_section(sweep: Mapping[str, Any]) -> Iterator[Html]:
    """Quality against size: KL to the original over bytes, a line a criterion."""
    size = number(sweep.get("bytes"))
    series: dict[str, list[tuple[float, float]]] = {}
    for c in items(sweep, "candidates"):
        first = [(size / 1e9, 0.0)] if size is not None else []
        points = series.setdefault(said(at(c, "criterion")), first)
        nbytes = number(at(c, "bytes"))
        _add(points, None if nbytes is None else nbytes / 1e9, at(c, "kl"))
    lines: Mapping[str, Points] = {name: sorted(points) for name, points in series.items()}
    rows: list[tuple[str, Html | str]] = [("of", said(sweep.get("source")))]
    for name in ("knee", "chosen"):
        if found := entries(sweep, name):
            kl = short(found.get("kl"))
            rows.append(
                (name, f"{said(found.get('criterion'))} {said(found.get('keep'))}, KL {kl}")
            )
    yield section(
        "Sweep",
        facts([*rows, *(("note", said(n)) for n in items(sweep, "notes"))]),
        figure(
            "Quality against size",
            chart(lines, "gigabytes on disk", "KL to the original, nats per token"),
        ),
        *_candidates(items(sweep, "candidates")),
    )


def _candidates(candidates: list[Any]) -> Iterator[Html]:
    rows = []
    for c in candidates:
        size = whole(at(c, "bytes"))
        figures = (short(at(c, name)) for name in ("kl", "loss", "top1"))
        names = (said(at(c, "criterion")), said(at(c, "keep")))
        rows.append((*names, "–" if size is None else bytes_text(size), *figures))
    if rows:
        yield table(("criterion", "keep", "bytes", "KL, nats", "loss", "top-1"), rows, right=1)
