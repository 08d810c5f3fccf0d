"""The router row of an expert that came later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from moe_compose.calibration.texts import tokens_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.initialise import said_options
from moe_compose.composition.kept import SEARCH_NAME, stats_of, with_stats, work_folder
from moe_compose.composition.measure import measure
from moe_compose.composition.options import Method, RoutingOptions
from moe_compose.composition.rows import solve, with_rows
from moe_compose.composition.search import Search, joined, search_added
from moe_compose.composition.statistics import RouterStats
from moe_compose.errors import OptionError
from moe_compose.recovery.ridge import solve as ridge_solve
from moe_compose.recovery.texts import held_out
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.expert_names import names_of
from moe_compose.surgery.pack_expert import ARTIFACT_NAME
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.selection import moe_form

#: The mean logit of a row that shall not be chosen.
_OFF = -30.0


class NewRow:
    """One row under way.

    Args:
        source: the model without the expert, or with the old one in its place.
        plan: the model with the expert.
        at: its number.
        name: what it is called.
        donor: where it comes from: a packed expert may bring statistics.
        texts: name → text.
        options: how rows follow from text.
        progress: told after every layer that is measured.
    """

    def __init__(
        self,
        source: TensorSource,
        plan: Plan,
        at: int,
        name: str,
        donor: Donor,
        texts: Mapping[str, Any],
        options: RoutingOptions,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._source, self._plan, self._at, self._name = source, plan, at, name
        self._donor, self._options, self._progress = donor, options, progress
        _, moe = moe_form(plan)
        known = names_of(plan.config, moe.num_experts)
        self._names = [n or str(i) for i, n in enumerate(known)]
        self._texts = {n: tokens_of(plan, t, options) for n, t in texts.items()}

    def plan(self, method: Method, *, every: bool) -> Plan:
        """The model with the row, or with all rows solved again; statistics beside it.

        Raises:
            OptionError: the row follows from text, or statistics, that are not there.
        """
        own, held = self._split()
        old = self._old(method)
        stats = self._joined(old, self._new(own, old, method))
        found = self._search(replace(stats, method=method), held)
        scale = self._scale(found, stats)
        stats = stats.scaled({self._name: scale})
        plan = with_rows(
            self._plan,
            self._all_rows(replace(stats, method=method)),
            only=None if every else [self._at],
            options=said_options(self._options, stats),
            notes=(f"router row of {self._name} by {method}, length {scale:g}",),
            reports={SEARCH_NAME: found.to_json()} if found is not None else {},
        )
        return with_stats(plan, stats) if len(stats.names) == len(self._names) else plan

    def off(self) -> Plan:
        """The model with a row whose logit is as constant, and as low, as a linear one can be: the
        least-squares fit of a constant to what routers are given.

        Raises:
            OptionError: there is no text.
        """
        if not self._texts:
            raise OptionError(
                "router = off needs text, to know what routers are given",
                hint=f"Any text will do, the more kinds the better: --data {self._name}=FILE.",
            )
        known = {n: t for n, t in self._texts.items() if n in self._names}
        kept = stats_of(self._source)
        old = kept.select([n for n in kept.names if n not in known]) if kept is not None else None
        parts = [self._measured(known, "hidden").select(list(known)), *([old] if old else [])]
        tokens = sum(e.tokens for stats in parts for e in stats.experts)
        rows, spread = {}, 0.0
        for layer, width in parts[0].widths.items():
            both = [(s, n.name) for s in parts for n in s.experts if n.tokens]
            second_DD = torch.stack([s.second(layer, n) for s, n in both]).sum(0) / tokens
            mean_D = torch.stack([s.sum(layer, n) for s, n in both]).sum(0) / tokens
            row_D = ridge_solve(second_DD, mean_D[:, None], self._options.ridge)[:, 0]
            mean = float(row_D @ mean_D)
            variance = max(float(row_D @ second_DD @ row_D) - mean**2, 0.0)
            rows[layer] = torch.zeros(len(self._names), width, dtype=torch.float64)
            rows[layer][self._at] = _OFF / mean * row_D
            spread = max(spread, variance**0.5 / mean)
        note = (
            f"{self._name} starts unused: its logit is {_OFF:g} ± {-_OFF * spread:.0f} (standard "
            "deviation over the text, largest layer)"
        )
        return with_rows(self._plan, rows, only=[self._at], notes=(note,))

    def _split(self) -> tuple[TokenSet | None, TokenSet | None]:
        """The expert's own text: to follow from, and to measure on."""
        text = self._texts.get(self._name)
        if text is None or self._options.row_scale is not None or not self._others():
            return text, None
        held = held_out(text, self._options.held_out)
        parts: tuple[list[Any], list[Any]] = ([], [])
        for i, sequence in enumerate(text.sequences):
            parts[i in held].append(sequence)
        return replace(text, sequences=tuple(parts[0])), replace(text, sequences=tuple(parts[1]))

    def _others(self) -> dict[str, TokenSet]:
        return {n: t for n, t in self._texts.items() if n != self._name}

    def _old(self, method: Method) -> RouterStats | None:
        """Statistics of the other experts: those that were kept, or measured now."""
        old = stats_of(self._source)
        before = [n for n in self._names if n != self._name]
        if old is not None:
            if missing := [n for n in before if n not in old.names]:
                raise OptionError(
                    f"the router statistics beside {self._source.label} know nothing of "
                    f"{', '.join(missing)}: they are of another set of experts"
                )
            return old.select(before)
        if method == "hidden":
            return None
        texts = {n: t for n, t in self._others().items() if n in before}
        if not texts:
            raise OptionError(
                "router = ridge tells experts apart: it needs statistics of the others beside the "
                "model, or their text",
                hint=f"Give text by expert, --data {before[0]}=FILE, or use --router hidden.",
            )
        return self._measured(texts, method).select(before)

    def _new(self, own: TokenSet | None, old: RouterStats | None, method: Method) -> RouterStats:
        """Statistics of the expert itself."""
        if own is not None:
            how = old.method if old is not None else method
            return self._measured({self._name: own}, how).select([self._name])
        donor = self._donor.source
        packed = stats_of(donor) if donor is not None and ARTIFACT_NAME in donor.files else None
        if packed is None:
            raise OptionError(
                f"router = {method} needs text of the new expert, or statistics packed with it",
                hint=f"Give it: --data {self._name}=FILE.",
            )
        return packed.renamed(packed.names[0], self._name)

    def _measured(self, texts: Mapping[str, TokenSet], method: Method) -> RouterStats:
        by_index = {self._names.index(n): t for n, t in texts.items()}
        options = replace(self._options, method=method)
        return measure(self._plan, by_index, options, folder=work_folder(), progress=self._progress)

    def _joined(self, old: RouterStats | None, new: RouterStats) -> RouterStats:
        """In the order of the experts."""
        if old is None:
            return new
        both = old.join(new)
        return both.select(self._names)

    def _search(self, stats: RouterStats, held: TokenSet | None) -> Search | None:
        """The longest row that leaves the other domains alone."""
        others = self._others()
        if self._options.row_scale is not None or not others:
            return None
        texts = {**others, **({self._name: held} if held is not None else {})}
        unit = stats.scaled({self._name: 1.0})
        return search_added(
            self._plan,
            self._all_rows(unit),
            self._at,
            joined(texts),
            self._options,
            without=self._source,
            own=[self._name],
        )

    def _all_rows(self, stats: RouterStats) -> dict[int, torch.Tensor]:
        """Rows `[E, D]`; zeros for experts of whom nothing is known."""
        known, rows = [self._names.index(n) for n in stats.names], {}
        for layer, found_ED in solve(stats).items():
            rows[layer] = torch.zeros(len(self._names), found_ED.shape[1], dtype=torch.float64)
            rows[layer][known] = found_ED
        return rows

    def _scale(self, found: Search | None, stats: RouterStats) -> float:
        """The length: as asked for, as searched, or as the other rows'."""
        if self._options.row_scale is not None:
            return self._options.row_scale
        if found is not None:
            return found.chosen
        lengths = [e.scale for e in stats.experts if e.name != self._name and e.tokens]
        return sum(lengths) / len(lengths) if lengths else 1.0
