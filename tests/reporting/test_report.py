"""The page: it parses, holds the figures, escapes whatever it is given, and loads nothing.

Run: pytest tests/reporting/test_report.py
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hand_made import Make, plan_of

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.reporting.figures import LEVELS, chart, heat_map
from moe_compose.reporting.page import Html, element
from moe_compose.reporting.report import html_report, write_report
from moe_compose.validation.report import Agreement, Check, Receipt, ValidationReport

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "!doctype"}
REPORT = ValidationReport(
    checkpoint="x",
    checks=(Check("names", "fail", EVIL, ("a & b",)),),
    receipt=Receipt(
        EVIL, "text", 99, (Agreement("float32", 1e-5, 2e-7, 3e-7, 4e-9, 0.5, 1.25, 1.5, 9),),
        "exact", True, "as measured",
    ),
)  # fmt: skip
DOCUMENTS = {
    "pruning.json": {"criterion": "reap", "kept": {"0": [0, 2], "1": [1, 3]},
                     "removed": {"0": [{"expert": 1}, {"expert": 3}]}},
    "merging.json": {"method": EVIL, "layers": {"0": [{"experts": [0, 1]}, {"experts": [2]}]}},
    "refit.json": {"layers": {"0": {"before": 0.5, "after": 0.25}}},
    "routing_search.json": {"scales": [0.5, 1], "losses": [{"en": 4.0}, {"en": 3.5}], "chosen": 1},
    "training.json": {"losses": [4.0, 3.0], "evaluations": [{"step": 0, "loss": 4.1}],
                      "start": {"loss": 4.1}, "best": {"loss": 3.9, "step": 2}},
    "max_kl.json": {"tried": [{"criterion": "reap", "keep": 2, "kl": 0.0125, "bytes": 4096}]},
}  # fmt: skip
SWEEP = {
    "source": EVIL, "bytes": 4_000_000_000, "knee": {"criterion": "reap", "keep": 3, "kl": 0.1},
    "candidates": [{"criterion": "reap", "keep": 3, "bytes": 3_000_000_000, "kl": 0.1, "loss": 2}],
}  # fmt: skip


class Page(HTMLParser):
    """Holds the nesting to account, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "tags are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(text: str) -> Page:
    """A page that parses, runs nothing and loads nothing."""
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "xlink:href", "data"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"https?:|@import|url\(", text)
    return page


def test_the_control_of_the_checks() -> None:
    for bad in ("<p><b></p>", "<script></script>", '<p onclick="x"></p>', "<p>http://x</p>"):
        with pytest.raises(AssertionError):
            checked(bad)


def moe(make: Make, **files: str) -> mc.Checkpoint:
    return make("mixtral", name="m<i>&", files=files, expert_names=[EVIL, "b", None, "d"])


def test_everything_on_one_page(make: Make) -> None:
    history = [{"operation": EVIL, "sources": [{"label": "a"}], "parameters": {"total": 1234}}]
    files = {name: json.dumps(content) for name, content in DOCUMENTS.items()}
    files |= {"validation.json": json.dumps(REPORT.to_json())}
    source = moe(make, **files, **{"moe_compose.json": json.dumps(history)})
    text = html_report(source, sweep=SWEEP)
    page = checked(text)
    assert EVIL in page.text and "&lt;script&gt;" in text
    inspection = mc.inspect(source)
    for figure in (
        f"{inspection.total:,}", f"{inspection.parameters.active:,}", "0 <script>", "1 b, 3 d",
        "1.23 K parameters", "2.0e-07", "50.00%", "1.2500", "a & b", "4.1 → 3.9 nats", "{0, 1}",
        "0.25", "reap 3, KL 0.1", "held-out loss, nats per token", "0.0125", "4.0 KiB",
    ):  # fmt: skip
        assert figure in page.text, figure
    told = [t for t in page.text.split("layer ") if "removed" in t[:30] or "kept" in t[:30]]
    assert sum("removed" in t[:30] for t in told) >= 2
    assert html_report(source, sweep=SWEEP) == text  # no dates, no order of its own


@pytest.mark.parametrize(
    "content",
    [
        '"text"',
        "[1]",
        "{}",
        '{"kept": 3, "layers": [], "tried": 1}',
        '{"kept": {"0": [9e99, -1, "x", 1e9]}, "losses": {"a": 1}}',
        '{"evaluations": [1, null], "candidates": "x"}',
        "[" * 9000,
    ],
)
def test_documents_that_anybody_may_have_written(make: Make, content: str) -> None:
    names = [*DOCUMENTS, "shared_parameters.json", "validation.json", "moe_compose.json"]
    source = moe(make, **dict.fromkeys(names, content))
    try:
        sweep = json.loads(content)
    except (ValueError, RecursionError):
        sweep = None
    checked(html_report(source, sweep=sweep if isinstance(sweep, dict) else None))


def test_statistics(make: Make, tmp_path: Path) -> None:
    from tiny_models import tiny_checkpoint

    tiny_checkpoint("mixtral", tmp_path / "m")
    source = mc.Checkpoint.open(tmp_path / "m")
    tokens = TokenSet.of_ids({EVIL: [[3, 4, 5, 6] * 5] * 2, "b": [[7, 8, 9] * 5] * 2})
    options = mc.CalibrateOptions(similarity=True, sample=8)
    stats = mc.calibrate(source, tokens, options, output=tmp_path / "stats")
    page = checked(html_report(source, stats=stats))
    share = float(stats.load_share(1)[2]) * stats.experts(1)
    assert f"layer 1, expert 2: {share:.2f} times an even load" in page.text
    cosine = float(stats.similarity(1).cosine_EE[0, 3])
    assert f"experts 0 and 3: {cosine:.3f}" in page.text
    assert f"{EVIL}, against all domains" in page.text
    with pytest.raises(mc.CheckpointError, match="measured on"):
        html_report(make("mixtral"), stats=stats)


def test_plans_and_dense_models_have_pages(make: Make, tmp_path: Path) -> None:
    plan = mc.prune(plan_of(make()), None, mc.PruneOptions(criterion="random", keep=3))
    page = checked(html_report(plan))
    assert "upcycle" in page.text and "Kept (filled)" in page.text
    checked(html_report(make(name="b", model_type="newcomer")))
    path = write_report(make(name="c"), tmp_path / "c.html")
    checked(path.read_text(encoding="utf-8"))
    with pytest.raises(mc.WriteError, match="is there already"):
        write_report(make(name="d"), path)
    with pytest.raises(mc.OptionError, match=r"must end in \.html"):
        write_report(make(name="e"), tmp_path / "c.pdf")


def test_elements_escape_once() -> None:
    inner = element("b", 'a < "b"')
    assert element("p", inner, "<", title='"') == (
        '<p title="&quot;"><b>a &lt; &quot;b&quot;</b>&lt;</p>'
    )
    assert isinstance(inner, Html) and element("p", "\x1b[2J\ud800") == "<p>�[2J�</p>"


def test_heat_maps() -> None:
    """Shades say the value; a map of a large model stays small."""
    small = heat_map([[0.0, 0.5, -1.0, None, 7.0]], ["0"], lambda r, c: f"{r} {c}")
    opacities = dict(re.findall(r'fill-opacity="([\d.]+)" class="(\w+)"', small))
    assert opacities == {f"{0.5:.2g}": "hot", "1": "hot"} and 'class="cold"' in small
    assert small.count("<title>") == 5 and small.count('class="none"') == 1
    assert round(0.5 * LEVELS) / LEVELS == 0.5
    rows: list[Any] = [[((r * 7 + c) % 25 - 12) / 12 for c in range(512)] for r in range(94)]
    large = heat_map(rows, list(map(str, range(94))), lambda r, c: "")
    assert len(large) < 1_500_000 and "<title>" not in large


def test_charts() -> None:
    found = chart({"a": [(0, 0), (10, 100)]}, "x", "y")
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', found)
    assert circles == [("56", "226"), ("696", "6")]  # the corners of the plot
    assert chart({"a": [(0.0, float("nan"))]}, "x", "y") == ""
    for values in ([(3, 3)], [(0, 1e-9), (1, 1e-9)], [(-1e12, 5), (1e12, 5)]):
        Page(chart({"a": values}, "x", "y"))
