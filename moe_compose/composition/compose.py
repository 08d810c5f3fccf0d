"""`compose`: models become the experts of one, with router rows that follow from their text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.options import Method, RoutingOptions, idle_text
from moe_compose.errors import OptionError
from moe_compose.surgery.compose import plan_composition
from moe_compose.surgery.compose_options import (
    WITH_TEXT,
    ComposeOptions,
    Shared,
    compose_option_problems,
)
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.members import Members, all_pairs
from moe_compose.surgery.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from moe_compose.calibration.texts import Texts

#: Which shared parameters were better, beside the result.
SHARED_NAME = "shared_best.json"

#: Tells how far a measurement is: layers done, layers in all.
Progress = Callable[[int, int], None]


def compose(
    base: TensorSource,
    donors: Mapping[str, Donor | TensorSource],
    options: ComposeOptions | None = None,
    texts: Mapping[str, Texts] | None = None,
    *,
    routing: RoutingOptions | None = None,
    embeddings: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan an MoE whose experts are independently trained models'.

    Args:
        base: a dense checkpoint: family, config, tokenizer, and expert 0 unless told otherwise.
        donors: name → where the expert comes from; a checkpoint is its own donor.
        options: see `ComposeOptions`.
        texts: name of an expert → its text, for router rows (`ridge`, `hidden`) and to choose
            between shared parameters (`best`).
        routing: how rows follow from text.
        embeddings: for router = domain: name of an expert → `[D]`, or `[N, D]` of its documents.
        progress: told after every layer that is measured.

    Returns:
        A checked plan. With text, statistics are written beside its result, so that experts can be
        added later without the old text.

    Raises:
        OptionError: options that cannot be meant, or text that is missing; all faults at once.
        UnsupportedError: models that cannot become one, every difference named.

    Example:
        >>> plan = mc.compose(                                     # doctest: +SKIP
        ...     seed, {"math": math, "code": code}, mc.ComposeOptions(top_k=2),
        ...     {"base": web, "math": problems, "code": python},
        ... )
    """
    given = {n: d if isinstance(d, Donor) else Donor(d.label, d) for n, d in donors.items()}
    chosen = settled(given, options or ComposeOptions(), texts, embeddings)
    work = _Work(base, given, texts or {}, routing or RoutingOptions(), embeddings or {}, progress)
    if chosen.shared != "best":
        return work.plan(chosen)
    return work.best(chosen)


def settled(
    donors: Mapping[str, Donor],
    options: ComposeOptions,
    texts: Mapping[str, Texts] | None,
    embeddings: Mapping[str, Tensor] | None,
) -> ComposeOptions:
    """The options with nothing left open.

    Raises:
        OptionError: options that cannot be meant, or text that is missing; all faults at once.
    """
    found = options.settled(text=bool(texts), pairs=all_pairs(list(donors.values())))
    problems = [
        *compose_option_problems(found, list(donors)),
        *_evidence_problems(found, list(donors), texts, embeddings),
    ]
    if problems:
        raise OptionError("these options cannot be meant", problems=problems)
    return found


def _evidence_problems(
    options: ComposeOptions,
    names: list[str],
    texts: Mapping[str, Texts] | None,
    embeddings: Mapping[str, Tensor] | None,
) -> list[str]:
    """What the options need and do not have."""
    experts = ["base", *names] if options.base_expert else names
    known = ", ".join(experts)
    problems = [
        f"text for {name!r}: there is no such expert ({known})"
        for name in texts or {}
        if name not in experts
    ]
    if options.router in WITH_TEXT and not texts:
        problems.append(f"router = {options.router} needs text of the experts (--data NAME=FILE)")
    if options.shared == "best" and not texts:
        problems.append("shared = best needs text to measure on (--data NAME=FILE)")
    if options.router == "domain":
        missing = [n for n in experts if n not in (embeddings or {})]
        if missing:
            problems.append(
                f"router = domain needs an embedding of {', '.join(missing)} (--embeddings FILE)"
            )
    elif embeddings:
        problems.append(f"embeddings have no meaning for router = {options.router}")
    if options.shared != "best":
        problems += idle_text(texts, options.router or "")
    return problems


class _Work:
    """One composition under way."""

    def __init__(
        self,
        base: TensorSource,
        donors: Mapping[str, Donor],
        texts: Mapping[str, Texts],
        routing: RoutingOptions,
        embeddings: Mapping[str, Tensor],
        progress: Progress | None,
    ) -> None:
        self._base, self._donors, self._texts = base, donors, texts
        self._routing, self._embeddings, self._progress = routing, embeddings, progress

    def plan(self, options: ComposeOptions) -> Plan:
        """The composition, routers included."""
        plan = plan_composition(self._base, self._donors, options)
        plan = self._with_report(plan, options)
        if options.router == "domain":
            return self._by_embeddings(plan)
        if options.router not in WITH_TEXT:
            return plan
        from moe_compose.composition.initialise import route_by_text
        from moe_compose.composition.kept import with_stats, work_folder

        method: Method = "hidden" if options.router == "hidden" else "ridge"
        routed, stats = route_by_text(
            plan,
            self._texts,
            replace(self._routing, method=method),
            folder=work_folder(),
            progress=self._progress,
        )
        return with_stats(routed, stats)

    def best(self, options: ComposeOptions) -> Plan:
        """Base or mean, whichever has the lower loss on held-out text."""
        kinds: tuple[Shared, ...] = ("base", "mean")
        plans = {kind: self.plan(replace(options, shared=kind)) for kind in kinds}
        losses = {kind: self._loss(plan) for kind, plan in plans.items()}
        chosen = min(losses, key=losses.__getitem__)
        plan = plans[chosen]
        said = ", ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items())
        return replace(
            plan,
            notes=(f"shared parameters: {chosen} (held-out loss: {said})", *plan.notes),
            reports={**plan.reports, SHARED_NAME: {"loss": losses, "chosen": chosen}},
        )

    def _loss(self, plan: Plan) -> float:
        """Mean over the domains, in nats per token; where rows follow from text, of other text."""
        from moe_compose.calibration.texts import tokens_of
        from moe_compose.composition.kept import SEARCH_NAME
        from moe_compose.composition.search import joined
        from moe_compose.evaluation.measure import evaluate
        from moe_compose.evaluation.options import EvaluateOptions

        search = plan.reports.get(SEARCH_NAME)
        if search is not None:
            losses = search["losses"][search["scales"].index(search["chosen"])]
        else:
            options = self._routing
            tokens = joined({n: tokens_of(plan, t, options) for n, t in self._texts.items()})
            how = EvaluateOptions(
                batch=options.batch, greedy=0, dtype=options.dtype, device=options.device
            )
            found = evaluate(plan, tokens, options=how)
            losses = {name: score.loss for name, score in found.domains.items()}
        return float(sum(losses.values()) / len(losses))

    def _with_report(self, plan: Plan, options: ComposeOptions) -> Plan:
        """How far shared parameters have diverged, where that matters."""
        if options.preset == "btx":
            return plan
        from moe_compose.composition.divergence import REPORT_NAME, divergence, require_equal

        found = divergence(Members(self._base, self._donors, options))
        if options.preset == "flexolmo":
            require_equal(found)
        moved = {n: s["tensors"] - s["equal"] for n, s in found.items() if s["farthest"]}
        said = ", ".join(f"{n} {count}" for n, count in moved.items()) or "none"
        return replace(
            plan,
            notes=(*plan.notes, f"shared tensors that differ from the base's: {said}"),
            reports={**plan.reports, REPORT_NAME: found},
        )

    def _by_embeddings(self, plan: Plan) -> Plan:
        """The same rows in all layers: each expert's mean embedding, of the length asked for."""
        import torch

        from moe_compose.composition.rows import with_rows
        from moe_compose.surgery.selection import moe_form

        _, moe = moe_form(plan)
        rows = []
        for name in plan.decided["experts"]:
            row = self._embeddings[name].double()
            row = row.mean(0) if row.dim() == 2 else row
            if row.shape != (moe.hidden,) or not bool(torch.isfinite(row).all()):
                raise OptionError(
                    f"the embedding of {name} must be {moe.hidden} finite numbers, or rows of them "
                    f"({list(self._embeddings[name].shape)})"
                )
            rows.append(torch.nn.functional.normalize(row, dim=0))
        scale = self._routing.row_scale or 1.0
        rows_ED = scale * torch.stack(rows)
        return with_rows(plan, dict.fromkeys(moe.sparse_layers, rows_ED))
