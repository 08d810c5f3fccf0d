"""The little HTML that a report needs. Text is escaped wherever it goes in, unless it is `Html`
already; nothing is loaded from anywhere: style and figures stand in the page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def joined(parts: Iterable[Html | str]) -> Html:
    """Parts one after the other; plain text among them is escaped."""
    return Html("".join(x if isinstance(x, Html) else html.escape(_shown(x)) for x in parts))


def element(name: str, *children: Html | str, **attributes: Any) -> Html:
    """`<name attributes>children</name>`; `class_` is `class`, `_` is `-`.

    >>> element("p", "1 < 2", class_="a")
    '<p class="a">1 &lt; 2</p>'
    """
    given = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{html.escape(_shown(str(v)), quote=True)}"'
        for k, v in attributes.items()
        if v is not None
    )
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def _shown(text: str) -> str:
    """Without what no page may hold: control characters, and halves of surrogate pairs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def table(head: Sequence[str], rows: Iterable[Sequence[Html | str]], *, right: int = 99) -> Html:
    """A table that scrolls on a narrow screen; columns from `right` on are numbers."""
    top = element("tr", *(element("th", h, class_=_side(i, right)) for i, h in enumerate(head)))
    body = (
        element("tr", *(element("td", c, class_=_side(i, right)) for i, c in enumerate(row)))
        for row in rows
    )
    whole = element("table", element("thead", top), element("tbody", *body))
    return element("div", whole, class_="scroll")


def _side(column: int, right: int) -> str | None:
    return "n" if column >= right else None


def facts(rows: Iterable[tuple[str, Html | str]]) -> Html:
    """Label and value, line by line."""
    pairs = (joined((element("dt", label), element("dd", value))) for label, value in rows)
    return element("dl", *pairs)


def tiles(rows: Iterable[tuple[str, str]]) -> Html:
    """A few figures, large."""
    each = (element("div", element("b", value), element("span", label)) for label, value in rows)
    return element("div", *each, class_="tiles")


def section(title: str, *parts: Html | str) -> Html:
    """A heading, and what stands under it."""
    return element("section", element("h2", title), *parts)


def figure(caption: str, *parts: Html | str) -> Html:
    """A picture with a caption above it."""
    return element("figure", element("figcaption", caption), *parts)


def folded(summary: str, *parts: Html | str) -> Html:
    """What is shown when somebody asks."""
    return element("details", element("summary", summary), *parts)


def note(text: str) -> Html:
    """An explanation, set small."""
    return element("p", text, class_="note")


def bar(share: float) -> Html:
    """A bar that fills this share of its place."""
    inner = element("div", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%")
    return element("div", inner, class_="bar")


def page(title: str, *parts: Html | str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"{element('title', title)}\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{element('main', *parts)}\n</body>\n</html>\n"
    )


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#60656c;--line:#e3e5e8;--soft:#f5f6f8;
--hot:#c2410c;--cold:#1d5fbf;--ok:#15803d;--bad:#b91c1c;--warn:#a16207;
--s0:#1d5fbf;--s1:#c2410c;--s2:#15803d;--s3:#7c3aed;--s4:#0e7490;--s5:#a16207}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--dim:#9aa0a8;--line:#2c3136;
--soft:#1c2024;--hot:#fb923c;--cold:#60a5fa;--ok:#4ade80;--bad:#f87171;--warn:#facc15;
--s0:#60a5fa;--s1:#fb923c;--s2:#4ade80;--s3:#c4a3ff;--s4:#22d3ee;--s5:#facc15}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:0 0 12px}
h3{font-size:15px;margin:20px 0 6px}
section{margin-top:36px;padding-top:20px;border-top:1px solid var(--line)}
.sub,.note{color:var(--dim)}.sub{margin:4px 0 20px}.note{font-size:13px;margin:8px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px}
.tiles div{background:var(--soft);border-radius:8px;padding:10px 14px}
.tiles b{display:block;font-size:20px}.tiles span{color:var(--dim);font-size:13px}
dl{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:4px 20px;margin:0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;margin:8px 0}
th{color:var(--dim);font-weight:500;text-align:left}
th,td{padding:4px 16px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
td:first-child,th:first-child{white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{width:140px;height:10px;margin-top:6px;background:var(--soft);border-radius:5px}
.bar div{height:100%;background:var(--s0);border-radius:5px}
figure{margin:16px 0}figcaption{font-weight:500;margin-bottom:6px}
svg{display:block}
svg text{fill:var(--dim);font:11px system-ui,sans-serif}
.hot{fill:var(--hot)}.cold{fill:var(--cold)}.cell{fill:transparent}.cell:hover{stroke:var(--fg)}
.frame{fill:none;stroke:var(--line)}.none{stroke:var(--dim);stroke-width:.7}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}
.s5{--c:var(--s5)}path.line{fill:none;stroke:var(--c);stroke-width:2}circle{fill:var(--c)}
.key{display:inline-block;margin-right:16px;font-size:13px;color:var(--dim)}
.key::before{content:"";display:inline-block;width:10px;height:10px;border-radius:5px;
margin-right:6px;background:var(--c)}
.ok{color:var(--ok)}.bad{color:var(--bad)}.warn{color:var(--warn)}
ol{padding-left:22px;margin:0}li{margin-bottom:12px}
details{margin:10px 0}summary{cursor:pointer;color:var(--dim)}
pre{background:var(--soft);border-radius:8px;padding:12px;overflow:auto;max-height:420px;
font-size:12px}
code{font-size:13px;overflow-wrap:anywhere}
@media(max-width:560px){main{padding:20px 14px 40px}dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:8px}.bar{width:80px}}
"""
