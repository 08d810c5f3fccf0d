"""Statistics of experts as screens: a table of the layers, and a map of who gets the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_compose.calibration.summary import LayerSummary, summarise
from moe_compose.reporting.units import bytes_text

from .screens import facts, grid_of, listed, title

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

#: Load in units of an even load: below each bound, its sign.
_SIGNS = ((0.25, "▁"), (0.5, "▂"), (0.75, "▃"), (1.25, "▄"), (1.75, "▅"), (2.5, "▆"), (4.0, "▇"))
_LEGEND = "one sign an expert: ▄ an even load, ▁ below ¼ of it, █ 4 times or more, × none at all"

#: Two halves of the data that agree less than this had too little of it.
ENOUGH = 0.8


def stats_screen(stats: ExpertStats) -> RenderableType:
    """What was measured, layer by layer."""
    layers = [summarise(stats, layer) for layer in stats.layers]
    record = stats.record
    by_domain = ", ".join(f"{d} {stats.tokens(d):,}" for d in stats.domains)
    rows: list[tuple[str, RenderableType]] = [
        ("of", f"{record.source} (digest {record.digest[:8]})"),
        ("tokens", f"{stats.tokens():,}: {by_domain}"),
        ("computed in", f"{record.dtype} on {record.device}, sequences of {record.seq_len}"),
    ]
    if record.sample:
        size = bytes_text(record.sample_bytes)
        rows.append(("similarity", f"on {record.sample} tokens, {size} on disk"))
    if record.loo_tokens:
        rows.append(("masked", f"each expert in turn, on {record.loo_tokens:,} tokens"))
    rows += listed("note", record.notes)
    rows.append(("enough?", _verdict(layers)))
    table = Padding(_layers_table(layers), (1, 0, 0, 2), expand=False)
    return Group(title("statistics of experts"), facts(rows), table, _dim(_EXPLAINED))


def _dim(text: str) -> RenderableType:
    return Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False)


_EXPLAINED = (
    "busiest: load of the busiest expert, 1 = even. entropy: of the router for a token, and of its "
    "mean distribution, 1 = ln E. Jaccard, τ: whether two halves of the text keep the same half of "
    "the experts by REAP, and rank them alike (Kendall), 1 = the same"
)


def _verdict(layers: Sequence[LayerSummary]) -> str:
    """Whether the text was enough, said by its two halves."""
    jaccard = sum(x.jaccard for x in layers) / len(layers)
    worst = min(layers, key=lambda x: x.jaccard)
    said = f"two halves of the text agree on {jaccard:.0%} of the experts to keep"
    least = f"least in layer {worst.layer} ({worst.jaccard:.0%})"
    more = "" if jaccard >= ENOUGH else ": take more text"
    return f"{said}, {least}{more}"


def _layers_table(layers: Sequence[LayerSummary]) -> RenderableType:
    head = ("layer", "experts", "busiest", "dead", "entropy", "mean", "Jaccard", "τ")
    rows: list[Sequence[RenderableType]] = [
        (
            str(x.layer),
            str(x.experts),
            f"{x.busiest:.2f}",
            Text(str(len(x.dead)), style="bold" if x.dead else ""),
            _number(x.entropy),
            _number(x.mean_entropy),
            f"{x.jaccard:.2f}",
            f"{x.tau:.2f}",
        )
        for x in layers
    ]
    return grid_of(head, rows, 0)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def load_screen(stats: ExpertStats) -> RenderableType:
    """Who gets the tokens, and whether domains make a difference."""
    parts: list[RenderableType] = [title("load", "layers down, experts across"), LoadMap(stats)]
    if len(stats.domains) > 1:
        layers = [summarise(stats, layer) for layer in stats.layers]
        rows = [(str(x.layer), *(f"{x.apart[d]:.0%}" for d in stats.domains)) for x in layers]
        table = grid_of(("layer", *stats.domains), rows, 1)
        parts += [
            Text(""),
            title("domains", "share of their load that lies elsewhere than the mean"),
        ]
        parts.append(Padding(table, (0, 0, 0, 2), expand=False))
    return Group(*parts)


class LoadMap:
    """A sign for every expert, as many as fit in a line; beyond it the busiest of each few."""

    def __init__(self, stats: ExpertStats) -> None:
        self._stats = stats

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        room = max(options.max_width - 10, 8)
        together = 1
        for layer in self._stats.layers:
            share = self._stats.load_share(layer)
            loads = [x * len(share) for x in share.tolist()]
            together = max(together, -(-len(loads) // room))
            groups = [loads[i : i + together] for i in range(0, len(loads), together)]
            yield Text(f"{layer:>6}  " + "".join(_sign(max(g)) for g in groups))
        more = f"; {together} experts a sign, the busiest counts" if together > 1 else ""
        yield _dim(f"{_LEGEND}{more}")


def _sign(load: float) -> str:
    if load == 0:
        return "×"
    return next((sign for bound, sign in _SIGNS if load < bound), "█")
