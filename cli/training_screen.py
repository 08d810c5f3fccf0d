"""A training, as screens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from moe_compose.reporting.units import bytes_text, count

from .screens import facts, grid_of, inset, title

if TYPE_CHECKING:
    from moe_compose.surgery.plan import Plan
    from moe_compose.training.setup import Intent

#: Layers and evaluations that are shown one by one.
SHOWN = 12

#: Of the report, in `Plan.reports`.
_REPORT = "training.json"


def training_screen(plan: Plan) -> RenderableType:
    """What a training brought: the curve, each domain, each layer's load."""
    report = plan.reports[_REPORT]
    if "layers" in report:
        return _layers_screen(report)
    evaluations, best = report["evaluations"], report["best"]["step"]
    kept = next(e for e in evaluations if e["step"] == best)
    rows = [_evaluation(e, best) for e in _some(evaluations, best)]
    parts: list[RenderableType] = [
        Text(""),
        title("training", f"{report['loss']}, held-out text"),
        inset(grid_of(("step", "loss", ""), rows)),
    ]
    if len(kept["domains"]) > 1:
        before = report["start"]["domains"]
        pairs = [(d, f"{before[d]:.4f}", f"{x:.4f}") for d, x in kept["domains"].items()]
        parts += [Text(""), inset(grid_of(("domain", "before", "after"), pairs))]
    layers = [(str(i), *_load(spread)) for i, spread in kept["layers"].items()]
    parts += [Text(""), title("load", "of the kept weights, on held-out text")]
    head = ("layer", "entropy", "dead", "largest / mean")
    parts.append(inset(grid_of(head, layers[: SHOWN * 4])))
    parts.append(facts(_facts(report)))
    return Group(*parts)


def _layers_screen(report: dict[str, Any]) -> RenderableType:
    """What each layer gained, trained one by one."""
    rows = [
        (
            layer,
            f"{x['before']:.3f}",
            f"{x['after']:.3f}",
            f"{x['load_after']['entropy']:.3f}",
            f"step {x['step']}" if x["changed"] else "left as it was: no gain",
        )
        for layer, x in report["layers"].items()
    ]
    head = ("layer", "before", "after", "entropy", "")
    what = "error of the layer's output, held-out text"
    return Group(Text(""), title("training", what), inset(grid_of(head, rows)))


def intent_screen(name: str, found: Intent) -> RenderableType:
    """What would train, and what it would take."""
    taken = f"{bytes_text(found.weights)} weights, {bytes_text(found.optimizer)} for what trains"
    if found.teacher:
        taken += f", {bytes_text(found.teacher)} teacher"
    if found.kept:
        taken += f", {bytes_text(found.kept)} hidden states"
    rows = [
        ("trains", f"{count(found.trained)} parameters"),
        ("text", f"{found.distinct:,} distinct tokens; {found.tokens:,} in all steps"),
        ("held out", f"{found.held_out:,} tokens"),
        ("balance", found.balance),
        ("memory", f"{taken}; activations and logits beside them"),
    ]
    return Group(title(name, "nothing is trained in a dry run"), facts(rows))


def _evaluation(entry: dict[str, Any], best: int) -> tuple[str, str, str]:
    return (str(entry["step"]), f"{entry['loss']:.4f}", "kept" if entry["step"] == best else "")


def _some(evaluations: list[dict[str, Any]], best: int) -> list[dict[str, Any]]:
    """All of them, or as many as fit, evenly."""
    step = -(-len(evaluations) // SHOWN)
    last = evaluations[-1]
    return [e for i, e in enumerate(evaluations) if not i % step or e is last or e["step"] == best]


def _load(spread: dict[str, Any]) -> tuple[str, str, str]:
    largest = f"{spread['max_violation'] + 1:.2f}"
    return (f"{spread['entropy']:.3f}", str(spread["dead"]), largest)


def _facts(report: dict[str, Any]) -> list[tuple[str, RenderableType]]:
    trained, frozen = report["trained"], report["frozen"]
    return [
        ("trained", f"{count(trained['parameters'])} parameters"),
        ("frozen", f"{frozen['tensors']} tensors, unchanged (SHA-256)"),
        ("speed", f"{report['tokens_per_second']:,} tokens/s, {report['seconds']:.0f} s"),
        ("ended", {"steps": "all steps done"}.get(report["stopped"], report["stopped"])),
    ]
