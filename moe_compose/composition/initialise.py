"""`route_by_text`: from each expert's text to a model that routes by it, nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.options import RoutingOptions
from moe_compose.recovery.texts import held_out
from moe_compose.surgery.plan import Plan

if TYPE_CHECKING:
    from moe_compose.composition.search import Search
    from moe_compose.composition.statistics import RouterStats

#: Tells how far the measurement is: layers done, layers in all.
Progress = Callable[[int, int], None]


def route_by_text(
    source: TensorSource,
    texts: Mapping[Any, Texts],
    options: RoutingOptions | None = None,
    *,
    folder: str | Path,
    progress: Progress | None = None,
) -> tuple[Plan, RouterStats]:
    """Measure, solve, search for the rows' length, and plan the model with these rows.

    Without `options.row_scale` part of each expert's text is held out, and nothing follows from it
    but the length.

    Args:
        source: an MoE, or a plan of one.
        texts: expert, by index or name → its text; an expert without has a row of zeros.
        options: see `RoutingOptions`.
        folder: where the statistics are written; they are read again by what is returned.
        progress: told after every layer that is measured.

    Returns:
        The plan, with `routing_search.json` among its reports; and the statistics with the rows'
        lengths, to be saved beside it (`stats.save(folder)`).

    Raises:
        OptionError: experts that are not there, or text that is too short or cannot be run.
        UnsupportedError: a family whose experts cannot be forced, or quantised routers.

    Example:
        >>> plan, stats = route_by_text(moe, {"py": python}, folder="work/")  # doctest: +SKIP
        >>> written = mc.write(plan, "out/")                                   # doctest: +SKIP
        >>> stats.save("out/")                                                 # doctest: +SKIP
    """
    from moe_compose.composition.kept import SEARCH_NAME
    from moe_compose.composition.measure import indices_of, measure
    from moe_compose.composition.rows import solve, with_rows
    from moe_compose.composition.search import joined, search
    from moe_compose.surgery.selection import moe_form

    options = options or RoutingOptions()
    keys = indices_of(source, texts, moe_form(source)[1].num_experts)
    tokens = {i: tokens_of(source, texts[key], options) for i, key in keys.items()}
    found: Search | None = None
    if options.row_scale is not None:
        stats = measure(source, tokens, options, folder=folder, progress=progress)
    else:
        held = {i: held_out(t, options.held_out) for i, t in tokens.items()}
        fitted = {
            i: replace(t, sequences=tuple(s for n, s in enumerate(t.sequences) if n not in held[i]))
            for i, t in tokens.items()
        }
        apart = {
            str(keys[i]): replace(t, sequences=tuple(t.sequences[n] for n in sorted(held[i])))
            for i, t in tokens.items()
        }
        stats = measure(source, fitted, options, folder=folder, progress=progress)
        found = search(source, solve(stats), joined(apart), options)
        stats = stats.scaled(dict.fromkeys(stats.names, found.chosen))
    plan = with_rows(
        source,
        solve(stats),
        options=said_options(options, stats),
        notes=(_said(options, stats),),
        reports={} if found is None else {SEARCH_NAME: found.to_json()},
    )
    return plan, stats


def said_options(options: RoutingOptions, stats: RouterStats) -> dict[str, Any]:
    """For the record and the card: whose text, how much of it, and a length that was asked for."""
    files = [f"{e.name}={f.name}" for e in stats.experts for f in e.files]
    return {"data": files, "text_tokens": options.tokens, "row_scale": options.row_scale}


def _said(options: RoutingOptions, stats: RouterStats) -> str:
    with_text = [e for e in stats.experts if e.tokens]
    text = (
        f"router rows by {options.method} from {sum(e.tokens for e in with_text)} tokens of "
        f"{len(with_text)} experts, length {with_text[0].scale:g}"
    )
    absent = [e.name for e in stats.experts if not e.tokens]
    return text + (f"; {', '.join(absent)} without text: a row of zeros" if absent else "")
