"""A plan as a screen: what a dry run shows, and every operation before it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from moe_compose.reporting.inspect import inspect
from moe_compose.reporting.units import bytes_text, count
from moe_compose.surgery.lora import Adapter
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.replace import Changed

from .output import visible
from .screens import facts, how_many, listed, title

if TYPE_CHECKING:
    from moe_compose.architectures.estimates import ServingMemory
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.reporting.inspection import Inspection

_KINDS = {"exact": "green", "approximate": "bold", "none": "bold"}


def _origins(source: TensorSource) -> Iterator[TensorSource]:
    """The models that a plan starts from, through plans of plans; no small parts put on them."""
    if isinstance(source, Plan):
        for earlier in source.sources.values():
            yield from _origins(earlier)
    elif not isinstance(source, Changed | Adapter):
        yield source


def _operations(plan: Plan) -> str:
    """The verbs, in the order in which they are carried out."""
    earlier = [s for s in plan.sources.values() if isinstance(s, Plan)]
    return " + ".join([*(_operations(p) for p in earlier), plan.operation])


def plan_screen(plan: Plan, output: str) -> RenderableType:
    """What a plan will write: the screen of `--dry-run`."""
    from moe_compose.reporting.card import method_of

    summary, after = plan.summary(), inspect(plan)
    origins = {getattr(s, "path", None) or id(s): s for s in _origins(plan)}  # each folder once
    befores = [inspect(source) for source in origins.values()]
    rows: list[tuple[str, RenderableType]] = [
        ("from", f"{b.checkpoint}: {short(b)}") for b in befores
    ]
    rows.append(("to", short(after)))
    if found := method_of(plan):
        name, what, paper = found
        rows += [("method", f"{name}: {what}"), ("paper", paper)]
    kind = plan.preservation.kind
    rest = str(plan.preservation).removeprefix(kind)
    rows.append(("preservation", Text.assemble((kind, _KINDS[kind]), visible(rest))))
    before = " + ".join(count(b.total) for b in befores)
    p = summary.parameters
    rows.append(("parameters", f"{before} → {count(p.total)} total, {count(p.active)} active"))
    copied = f", {summary.copied_bytes / max(summary.bytes, 1):.1%} of it copied as it is"
    local = all(b.weight_files for b in befores)
    on_disk = f"{bytes_text(summary.bytes)} in {summary.tensors:,} tensors"
    rows.append(("bytes", on_disk + (copied if local else "")))
    rows.append(("to serve", _memory_line(summary.memory)))
    rows += listed("note", [note for note in plan.notes if note not in rest])
    rows.append(("digest", plan.digest()))
    return Group(title(_operations(plan), f"→ {output}"), facts(rows))


def short(found: Inspection) -> str:
    """A checkpoint in one line: `llama, dense, 5 layers`."""
    words = [found.model_type or "unknown family", {"moe": "MoE"}.get(found.kind, found.kind)]
    if found.experts and found.sparse_layers:
        e = found.experts
        words.append(f"{e.num_experts} experts of width {e.width}, {e.top_k} per token")
        words += [f"shared expert of width {e.shared_width}"] if e.shared_width else []
        words.append(f"in {how_many(found)} layers")
    else:
        words.append(f"{found.layers or 0} layers")
    return ", ".join(words)


def _memory_line(memory: ServingMemory) -> str:
    weights = ", ".join(f"{name} {bytes_text(size)}" for name, size in memory.weights.items())
    return f"{weights} (estimates; cache and activations on top)"
