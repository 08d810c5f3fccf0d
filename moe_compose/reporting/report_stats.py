"""The part of a report that statistics fill: who gets the tokens, of which domain, and how alike
experts are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_compose.calibration.summary import LayerSummary, summarise
from moe_compose.reporting.figures import Row, heat_map
from moe_compose.reporting.page import Html, facts, figure, folded, note, section, table

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

#: Load and specialisation are shown between 1/16 and 16 times the mean, or less if they are.
_MOST_DOUBLINGS = 4

#: Cells of all maps of similarity together.
_MOST_CELLS = 100_000


def stats_sections(stats: ExpertStats) -> Iterator[Html]:
    """Load, domains and similarity."""
    layers = [summarise(stats, layer) for layer in stats.layers]
    yield section("Routing load", _measured(stats, layers), *_load(stats))
    if len(stats.domains) > 1:
        apart = [(str(x.layer), *(f"{x.apart[d]:.0%}" for d in stats.domains)) for x in layers]
        table_of = table(("layer", *stats.domains), apart, right=1)
        told = note("Share of a domain's load that lies elsewhere than the mean of the domains'.")
        yield section("Domains", *_special(stats), table_of, told)
    if stats.record.sample and stats.folder is not None:
        yield section("Similarity of experts", *_similarities(stats))


def _measured(stats: ExpertStats, layers: list[LayerSummary]) -> Html:
    record = stats.record
    domains = ", ".join(f"{d} {stats.tokens(d):,}" for d in stats.domains)
    jaccard = sum(x.jaccard for x in layers) / len(layers)
    told = facts(
        [
            ("tokens", f"{stats.tokens():,}: {domains}"),
            ("computed in", f"{record.dtype} on {record.device}, sequences of {record.seq_len}"),
            ("enough?", f"two halves of the text agree on {jaccard:.0%} of the experts to keep"),
        ]
    )
    head = ("layer", "experts", "busiest", "dead", "entropy", "of the mean", "Jaccard", "τ")
    rows = [
        (
            *(str(x.layer), str(x.experts), f"{x.busiest:.2f}", str(len(x.dead))),
            *(_number(x.entropy), _number(x.mean_entropy), f"{x.jaccard:.2f}", f"{x.tau:.2f}"),
        )
        for x in layers
    ]
    explained = note(
        "busiest: load of the busiest expert, 1 is even. entropy: of the router for a token, and "
        "of its mean distribution, 1 is ln E. Jaccard, τ: how far two halves of the text agree."
    )
    return Html(told + folded("layer by layer", table(head, rows, right=0), explained))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _load(stats: ExpertStats) -> Iterator[Html]:
    shares = [stats.load_share(layer).tolist() for layer in stats.layers]
    loads = [[x * len(row) for x in row] for row in shares]
    most = _doublings(loads)
    yield _map("Load by layer and expert", stats, loads, "times an even load", most)
    yield _scale(most)


def _special(stats: ExpertStats) -> Iterator[Html]:
    """A map for every domain, all on one scale."""
    every = [stats.specialisation(layer).tolist() for layer in stats.layers]
    most = max(map(_doublings, every))
    for i, domain in enumerate(stats.domains):
        rows = [layer[i] for layer in every]
        title, unit = f"{domain}, against all domains", "times its mean over the domains"
        yield _map(title, stats, rows, unit, most)
    yield _scale(most)


def _doublings(values: list[list[float]]) -> int:
    """Of the mean, up to the largest value."""
    largest = max((x for row in values for x in row), default=1.0)
    return min(max(math.ceil(math.log2(max(largest, 1.0))), 1), _MOST_DOUBLINGS)


def _scale(most: int) -> Html:
    part = {1: "half", 2: "a quarter", 3: "an eighth", 4: "a 16th"}[most]
    return note(
        f"Nothing: the mean. Full colour: {2**most} times it (warm) or {part} of it (cold). "
        "A cross: no token at all."
    )


def _map(
    title: str, stats: ExpertStats, values: list[list[float]], unit: str, doublings: int
) -> Html:
    """Values around 1, full colour at so many doublings."""
    rows: list[Row] = [[math.log2(x) / doublings if x > 0 else None for x in r] for r in values]
    layers = list(map(str, stats.layers))

    def tell(r: int, c: int) -> str:
        return f"layer {layers[r]}, expert {c}: {values[r][c]:.2f} {unit}"

    return figure(title, heat_map(rows, layers, tell))


def _similarities(stats: ExpertStats) -> Iterator[Html]:
    """The cosine of the experts' outputs, of as many layers as fit; the middle one is open."""
    yield note(
        f"Cosine of two experts' outputs on the same {stats.record.sample} tokens, mean over them; "
        "full colour: 1, or -1 (cold)."
    )
    layers = list(stats.layers)
    middle = layers[len(layers) // 2]
    yield _cosines(stats, middle)
    cells = 0
    for layer in layers:
        cells += stats.experts(layer) ** 2
        if layer != middle and cells <= _MOST_CELLS:
            yield folded(f"layer {layer}", _cosines(stats, layer))


def _cosines(stats: ExpertStats, layer: int) -> Html:
    cosine = stats.similarity(layer).cosine_EE.tolist()
    names = list(map(str, range(len(cosine))))

    def tell(r: int, c: int) -> str:
        return f"experts {r} and {c}: {cosine[r][c]:.3f}"

    return figure(f"Layer {layer}", heat_map(cosine, names, tell))
