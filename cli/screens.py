"""Results as screens: what a plan, an inspection or a validation looks like. Nothing is printed
here, and texts are never read as markup (the console has it switched off).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_compose.reporting.inspection import CONVENTION, Inspection, parts_of
from moe_compose.reporting.units import bytes_text, count

from .history_screen import history_rows
from .output import visible

if TYPE_CHECKING:
    from moe_compose.architectures.parts import Parameters
    from moe_compose.reporting.catalogue import FamilyRow, MethodRow
    from moe_compose.validation.report import Check, Receipt, ValidationReport

#: Files of weights that are shown one by one.
FILES = 8

_SIGNS = {
    "pass": ("✓", "green"),
    "warn": ("!", "yellow"),
    "fail": ("✗", "bold red"),
    "skip": ("–", "dim"),
}


def title(text: str, rest: str = "") -> RenderableType:
    """A heading: a name, and what it is."""
    if not rest:
        return Text(visible(text), "bold")
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column(overflow="fold")
    grid.add_row(Text(visible(text), "bold"), Text(visible(rest)))
    return grid


def facts(rows: Sequence[tuple[str, RenderableType]]) -> RenderableType:
    """Label and value, line by line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(label, Text(visible(value)) if isinstance(value, str) else value)
    return Padding(grid, (0, 0, 0, 2), expand=False)


def listed(label: str, texts: Sequence[str]) -> list[tuple[str, RenderableType]]:
    """Facts of one label; of several, each begins with a dash."""
    if len(texts) == 1:
        return [(label, texts[0])]
    return [("" if i else label, _item(text)) for i, text in enumerate(texts)]


def _item(text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("-", Text(visible(text)))
    return grid


def grid_of(
    head: Sequence[str], rows: Sequence[Sequence[RenderableType]], right: int = 99
) -> Table:
    """A table; columns from `right` on are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i >= right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(c)) if isinstance(c, str) else c for c in row))
    return table


def _indented(*parts: RenderableType) -> RenderableType:
    return Padding(Group(*parts), (1, 0, 0, 2), expand=False)


def inset(part: RenderableType) -> RenderableType:
    """What stands under a title."""
    return Padding(part, (0, 0, 0, 2), expand=False)


def how_many(found: Inspection) -> str:
    """`all 5`, or `12 of 24`."""
    sparse, layers = len(found.sparse_layers), found.layers or 0
    return f"all {layers}" if sparse == layers else f"{sparse} of {layers}"


def inspection_screen(found: Inspection) -> RenderableType:
    """A checkpoint, as `moe-compose inspect` shows it."""
    kind = {"moe": "mixture of experts", "unknown": "unknown family"}.get(found.kind, found.kind)
    what = f"{found.hf_class or '?'} ({found.model_type or 'no model_type'}), {kind}"
    parts: list[RenderableType] = [title(found.checkpoint, what), facts(_inspection_facts(found))]
    if found.parameters:
        parts.append(_indented(_parts_table(found.parameters), Text(CONVENTION, style="dim")))
    else:
        parts.append(_indented(Text(f"{found.elements:,} elements in all tensors")))
    parts.append(_indented(*_memory_table(found)))
    if found.weight_files or found.files:
        parts.append(_indented(_files_table(found)))
    return Group(*parts)


def _inspection_facts(found: Inspection) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = []
    sizes = [
        f"{found.layers} layers" if found.layers else "",
        f"hidden {found.hidden}" if found.hidden else "",
        f"vocabulary {found.vocabulary:,}" if found.vocabulary else "",
        f"context {found.memory.context:,} tokens" if found.memory.context else "",
    ]
    rows.append(("sizes", ", ".join(s for s in sizes if s) or "not told by the config"))
    if e := found.experts:
        shared = f", shared expert of width {e.shared_width}" if e.shared_width else ""
        zero = f", {e.zero_experts} of no FFN at all" if e.zero_experts else ""
        text = f"{e.num_experts} of width {e.width}, {e.top_k} per token{shared}{zero}"
        rows += [("experts", f"{text}; in {how_many(found)} layers"), ("routing", e.routing)]
        if e.names:
            named = [f"{i} {name}" for i, name in enumerate(e.names) if name]
            rows.append(("names", ", ".join(named)))
    if found.parameters and found.parameters.mtp:
        rows.append(("MTP", f"{found.parameters.mtp:,} parameters, outside the counts below"))
    dtypes = [f"{d} {bytes_text(s.bytes)} in {s.tensors:,}" for d, s in found.dtypes.items()]
    rows.append(("tensors", ", ".join(dtypes)))
    rows += history_rows(found.history)
    if found.validation is not None:
        rows.append(("validation", _verdict(found.validation)))
    rows += listed("note", found.notes)
    if found.revision:
        rows.append(("revision", found.revision))
    return rows


def _verdict(report: Mapping[str, Any]) -> RenderableType:
    receipt = report.get("receipt")
    said = receipt.get("verdict") if isinstance(receipt, Mapping) else "no comparison with a source"
    if report.get("ok"):
        return Text.assemble(("✓ ", "green"), visible(str(said)))
    return Text.assemble(("✗ not ok ", "bold red"), visible(str(said or "")))


def _parts_table(parameters: Parameters) -> Table:
    p = parameters
    rows: list[Sequence[RenderableType]] = [
        (name, f"{part.total:,}", f"{part.active:,}", f"{part.total / max(p.total, 1):.1%}")
        for name, part in parts_of(p).items()
    ]
    bold = (Text(f"{n:,} ({count(n)})", style="bold") for n in (p.total, p.active))
    return grid_of(("parameters", "total", "active", "share"), [*rows, ("all", *bold, "")], 1)


def _memory_table(found: Inspection) -> Iterator[RenderableType]:
    memory, cache = found.memory, found.cache_full
    rows: list[Sequence[RenderableType]] = []
    for name, size in memory.weights.items():
        rows.append((name, bytes_text(size), bytes_text(size + cache) if cache else "–"))
    with_cache = f"with cache of {memory.context:,} tokens" if cache else "with cache"
    yield grid_of(("memory to serve", "weights", with_cache), rows, 1)
    if memory.cache_per_token:
        per = bytes_text(memory.cache_per_token)
        text = f"key-value cache in bf16: {per} per token; activations come on top (10-20%)"
        yield Text(text, style="dim")


def _files_table(found: Inspection) -> Table:
    """All files; of many with weights, the first and the last."""
    weights = list(found.weight_files.items())
    if len(weights) > FILES:
        between = f"{len(weights) - 2} files between"
        weights = [weights[0], (between, sum(size for _, size in weights[1:-1])), weights[-1]]
    rows: list[Sequence[RenderableType]] = [
        (name, bytes_text(size), "weights") for name, size in weights
    ]
    rows += [(name, bytes_text(size), "") for name, size in found.files.items()]
    table = grid_of(("file", "size", ""), rows)
    table.columns[1].justify = "right"
    return table


def report_screen(report: ValidationReport) -> RenderableType:
    """Checks, forward pass, receipt and verdict."""
    from .forward_screen import forward_screen

    parts: list[RenderableType] = [title("checks", report.checkpoint), _checks(report.checks)]
    if report.forward:
        parts += [Text(""), *forward_screen(report.forward)]
    if report.receipt:
        parts += [Text(""), *_receipt(report.receipt)]
    sign = Text("✓ valid", "bold green") if report.ok else Text("✗ not valid", "bold red")
    return Group(*parts, Text(""), sign)


def _checks(checks: Sequence[Check]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        sign, style = _SIGNS[check.status]
        text = Text(visible(check.detail))
        for problem in check.problems:
            text.append(f"\n- {visible(problem)}")
        grid.add_row(Text(sign, style), Text(visible(check.name)), text)
    return Padding(grid, (0, 0, 0, 2), expand=False)


def _receipt(receipt: Receipt) -> Iterator[RenderableType]:
    what = f"against {receipt.against}, {receipt.text}, {receipt.tokens} tokens; nats"
    yield title("step-0 receipt", what)
    rows = [
        (
            a.dtype,
            f"{a.max_error:.1e}",
            f"{a.relative_error:.1e}",
            f"{a.median_error:.1e}",
            f"{a.kl:.1e}",
            f"{a.top1:.2%}",
            f"{a.loss:.4f}",
            f"{a.reference_loss:.4f}",
        )
        for a in receipt.agreements
    ]
    head = ("logits", "max", "relative", "median", "KL", "top-1", "loss", "source")
    yield Padding(grid_of(head, rows, 1), (0, 0, 0, 2), expand=False)
    for a in receipt.agreements:
        if a.noise is not None:
            text = f"the source in {a.dtype} against itself in float32: median {a.noise:.1e}"
            top1 = f", top-1 {a.noise_top1:.2%}" if a.noise_top1 is not None else ""
            yield Padding(Text(text + top1, style="dim"), (0, 0, 0, 2), expand=False)
    sign, style = _SIGNS["pass" if receipt.met else "fail"]
    verdict = Text.assemble((sign, style), " ", visible(receipt.verdict))
    yield facts([("stated", receipt.stated), ("measured", verdict)])


def families_screen(rows: Sequence[FamilyRow]) -> RenderableType:
    """`ls architectures`: MoE families, then the dense ones that grow into them."""
    moe = [(r.family, _family_text(r)) for r in rows if r.experts]
    dense = [(r.family, ", ".join(r.grows_into) or "–") for r in rows if not r.experts]
    legend = "fused: gate and up in one tensor. * unless config.json says otherwise."
    return Group(
        grid_of(("MoE family", "experts on disk, dense families it grows from, routing"), moe),
        Text(legend, style="dim"),
        Text(""),
        grid_of(("dense family", "grows into"), dense),
    )


def _family_text(row: FamilyRow) -> Text:
    grown = f"; grows from {', '.join(row.grown_from)}" if row.grown_from else ""
    star = " *" if row.decided_by else ""
    return Text.assemble(row.experts, (grown, "green"), f"\n{row.routing}{star}")


def methods_screen(rows: Sequence[MethodRow]) -> RenderableType:
    """`ls methods`: a table for every operation."""
    parts: list[RenderableType] = []
    for operation in dict.fromkeys(r.operation for r in rows):
        grows = operation == "upcycle"
        head = (operation, "what it does", "preservation" if grows else "needs", "paper")
        table = [
            (r.method, r.summary, r.preservation if grows else r.needs, r.paper)
            for r in rows
            if r.operation == operation
        ]
        parts += [*([Text("")] if parts else []), grid_of(head, table)]
    return Group(*parts)
