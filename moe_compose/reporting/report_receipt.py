"""The part of a report that `validation.json` fills: verdict, checks, forward pass, receipt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_compose.reporting.loose import at, entries, items, number, said
from moe_compose.reporting.page import Html, element, facts, folded, joined, section, table

_SIGNS = {"pass": ("✓", "ok"), "warn": ("!", "warn"), "fail": ("✗", "bad"), "skip": ("–", "")}

#: Of an agreement, as columns: name → title and format.
_COLUMNS = {
    "max_error": ("max error", ".1e"),
    "relative_error": ("relative", ".1e"),
    "median_error": ("median", ".1e"),
    "kl": ("KL, nats", ".1e"),
    "top1": ("top-1", ".2%"),
    "loss": ("loss", ".4f"),
    "reference_loss": ("of the source", ".4f"),
}


def validation_section(report: Mapping[str, Any] | None) -> Iterator[Html]:
    """The section; nothing without a report."""
    if report is None:
        return
    good = report.get("ok") is True
    verdict = element("p", "✓ valid" if good else "✗ not valid", class_="ok" if good else "bad")
    parts = [verdict, *_receipt(entries(report, "receipt")), *_checks(items(report, "checks"))]
    if forward := entries(report, "forward"):
        rows = [(k, said(v)) for k, v in forward.items() if not isinstance(v, list | Mapping)]
        layers = [x for x in items(forward, "layers") if isinstance(x, Mapping)]
        parts.append(folded("forward pass", facts(rows), *_layers(layers)))
    yield section("Validation", *parts)


def _receipt(receipt: Mapping[str, Any]) -> Iterator[Html]:
    if not receipt:
        return
    head = ("logits", *(title for title, _ in _COLUMNS.values()))
    rows = [
        (said(at(a, "dtype")), *(_figure(at(a, name), how) for name, (_, how) in _COLUMNS.items()))
        for a in items(receipt, "agreements")
    ]
    on = f"{said(receipt.get('text'))}, {said(receipt.get('tokens'))} tokens"
    yield facts(
        [
            ("against", said(receipt.get("against"))),
            ("on", on),
            ("stated", said(receipt.get("stated"))),
            ("measured", said(receipt.get("verdict"))),
        ]
    )
    yield table(head, rows, right=1)


def _figure(value: Any, how: str) -> str:
    found = number(value)
    return "–" if found is None else format(found, how)


def _checks(checks: list[Any]) -> Iterator[Html]:
    rows = []
    for check in checks:
        sign, style = _SIGNS.get(said(at(check, "status")), ("?", ""))
        problems = [element("div", f"- {said(p)}") for p in items(check, "problems")]
        found = joined((said(at(check, "detail")), *problems))
        rows.append((element("span", sign, class_=style), said(at(check, "name")), found))
    if rows:
        yield element("h3", "Checks")
        yield table(("", "check", "found"), rows)


def _layers(layers: list[Mapping[str, Any]]) -> Iterator[Html]:
    """Whatever figures the layers have, as a table."""
    names = list(dict.fromkeys(n for x in layers for n, v in x.items() if not _large(v)))
    if names:
        yield table(names, ([said(x.get(n)) for n in names] for x in layers), right=1)


def _large(value: Any) -> bool:
    return isinstance(value, list | Mapping)
