"""A checkpoint on one page: what it is, what was done to it, what was measured, as one HTML file
that loads nothing and can be sent to anybody.

Everything that stands beside the checkpoint (`validation.json`, `pruning.json`, ...) is shown if it
is there; statistics and a sweep are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.copying import write_file
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError, WriteError
from moe_compose.reporting.inspect import inspect
from moe_compose.reporting.inspection import CONVENTION, Inspection
from moe_compose.reporting.page import (
    Html,
    bar,
    element,
    facts,
    folded,
    joined,
    note,
    page,
    section,
    table,
    tiles,
)
from moe_compose.reporting.report_documents import document_sections, sweep_section
from moe_compose.reporting.report_receipt import validation_section
from moe_compose.reporting.steps import steps_of
from moe_compose.reporting.units import bytes_text, count
from moe_compose.version import __version__

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats


def html_report(
    source: TensorSource,
    *,
    stats: ExpertStats | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> str:
    """The page of a checkpoint, or of a plan. Reads no weights.

    The same checkpoint and figures give the same text: it holds no date and no path.

    Args:
        source: what it is about.
        stats: what was measured on it: load, specialisation, similarity.
        sweep: what `Sweep.to_json` gave.

    Returns:
        HTML, whole. Names from files are escaped; nothing is loaded from elsewhere.

    Raises:
        CheckpointError: the statistics are of another checkpoint.
    """
    found = inspect(source)
    parts = [*_head(found), _architecture(found), _parameters(found)]
    if stats is not None:
        from moe_compose.reporting.report_stats import stats_sections

        parts += stats_sections(stats.check(source))
    parts += [*_history(found), *validation_section(found.validation)]
    parts += [*document_sections(source), *([] if sweep is None else sweep_section(sweep))]
    parts.append(element("footer", note(f"Made by moe-compose {__version__}.")))
    return page(f"{found.checkpoint}: moe-compose report", *parts)


def check_page(path: Path) -> Path:
    """A file's path, if a page may have that name.

    Raises:
        OptionError: it does not end in `.html`.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"the page ({path.name}) must end in .html")
    return path


def write_report(
    source: TensorSource,
    path: str | Path,
    *,
    stats: ExpertStats | None = None,
    sweep: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the page into a file; returns its path.

    Raises:
        OptionError: the file does not end in `.html`.
        CheckpointError: as `html_report`.
        WriteError: it is there, or cannot be written.
    """
    path = check_page(Path(path).expanduser())
    if path.exists() and not overwrite:
        raise WriteError(f"{path} is there already", hint="Replace it with --overwrite.")
    write_file(path, html_report(source, stats=stats, sweep=sweep).encode())
    return path


def _head(found: Inspection) -> Iterator[Html]:
    kind = {"moe": "mixture of experts", "unknown": "unknown family"}.get(found.kind, found.kind)
    what = f"{found.hf_class or '?'} ({found.model_type or 'no model_type'}), {kind}"
    yield element("h1", found.checkpoint)
    yield element("p", what, class_="sub")
    rows = [("parameters", count(found.total))]
    if found.parameters:
        rows.append(("active per token", count(found.parameters.active)))
    if e := found.experts:
        rows.append(("experts, per token", f"{e.num_experts}, {e.top_k}"))
    rows += [("layers", str(found.layers or "?")), ("on disk", bytes_text(found.bytes))]
    yield tiles(rows)


def _architecture(found: Inspection) -> Html:
    rows: list[tuple[str, Html | str]] = []
    sizes = (("hidden", found.hidden), ("vocabulary", found.vocabulary))
    rows += [(name, f"{size:,}") for name, size in sizes if size]
    if found.memory.context:
        rows.append(("context", f"{found.memory.context:,} tokens"))
    if e := found.experts:
        shared = f", shared expert of width {e.shared_width}" if e.shared_width else ""
        zero = f", {e.zero_experts} of no FFN at all" if e.zero_experts else ""
        where = f"{len(found.sparse_layers)} of {found.layers} layers"
        rows.append(("experts", f"{e.num_experts} of width {e.width}{shared}{zero}; in {where}"))
        rows.append(("routing", e.routing))
        if e.names:
            named = (f"{i} {name}" for i, name in enumerate(e.names) if name)
            rows.append(("names", ", ".join(named)))
    stored = [f"{d}: {bytes_text(s.bytes)} in {s.tensors}" for d, s in found.dtypes.items()]
    rows += [("tensors", "; ".join(stored)), ("digest", element("code", found.digest))]
    if found.revision:
        rows.append(("revision", element("code", found.revision)))
    rows += [("note", text) for text in found.notes]
    return section("Architecture", facts(rows))


def _parameters(found: Inspection) -> Html:
    parts: list[Html] = []
    if found.parameters:
        rows = [
            (name, f"{p.total:,}", f"{p.active:,}", f"{p.total / max(found.total, 1):.1%}", bar(x))
            for name, p in found.parts().items()
            for x in [p.total / max(found.total, 1)]
        ]
        active = f"{found.parameters.active:,}"
        rows.append(("all", f"{found.total:,}", active, "", Html("")))
        head = ("part", "total", "active per token", "share", "")
        parts += [table(head, rows, right=1), note(CONVENTION)]
    cache, context = found.cache_full, found.memory.context
    memory = [
        (name, bytes_text(size), bytes_text(size + cache) if cache else "–")
        for name, size in found.memory.weights.items()
    ]
    with_cache = f"with cache of {context:,} tokens" if cache else "with cache"
    parts.append(element("h3", "Memory to serve (estimate)"))
    parts.append(table(("weights in", "weights", with_cache), memory, right=1))
    files = {**found.weight_files, **found.files}
    rows_of_files = [(name, bytes_text(size)) for name, size in files.items()]
    if rows_of_files:
        said = "1 file" if len(files) == 1 else f"{len(files)} files"
        parts.append(folded(said, table(("file", "size"), rows_of_files, right=1)))
    return section("Parameters and memory", *parts)


def _history(found: Inspection) -> Iterator[Html]:
    """What was done, oldest first."""
    items = []
    for step in steps_of(found.history):
        of = f" of {', '.join(step.sources)}" if step.sources else ""
        options = "; ".join(f"{name} {value}" for name, value in step.options.items())
        size = f"{count(step.total)} parameters, " if step.total is not None else ""
        active = f"{count(step.active)} active, " if step.active is not None else ""
        why = f" ({step.why})" if step.why else ""
        lines = [
            joined((element("b", step.operation), of)),
            element("div", options) if options else "",
            note(f"{size}{active}preservation {step.preservation}{why}"),
            note(f"plan {step.digest[:16]}, moe-compose {step.version}"),
        ]
        items.append(element("li", *lines))
    if items:
        yield section("Surgery history", element("ol", *items))
