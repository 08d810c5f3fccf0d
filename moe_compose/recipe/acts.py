"""What the steps of a recipe do: each takes where the recipe stands, its options, and what else is
given, and returns a plan, or leaves statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import read_texts
from moe_compose.errors import OptionError
from moe_compose.recipe.inputs import by_name

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.surgery.donors import Donor
    from moe_compose.surgery.plan import Plan


@dataclass
class State:
    """Where a recipe stands.

    Attributes:
        model: the last result.
        before: what the last operation started from.
        stats: of the last calibration.
        work: a folder for what steps leave for later ones.
        resume: go on with what an interrupted run left.
    """

    work: Path
    resume: bool = False
    model: TensorSource | None = None
    before: TensorSource | None = None
    stats: ExpertStats | None = None
    opened: dict[str, TensorSource] = field(default_factory=dict)

    def open(self, name: str) -> TensorSource:
        """A checkpoint by its path or name, opened once."""
        from moe_compose.checkpoint.reader import Checkpoint

        if name not in self.opened:
            self.opened[name] = Checkpoint.open(name)
        return self.opened[name]

    def source(self, given: Mapping[str, Any]) -> TensorSource:
        """What a step starts from: its own source, or the last result."""
        if "source" in given:
            return self.open(given["source"])
        if self.model is None:
            raise OptionError("the first step needs a source (source: FOLDER)")
        return self.model

    def donor(self, text: str) -> Donor:
        """Where an expert comes from."""
        from moe_compose.surgery.donors import Donor

        return Donor.parse(text, self.open)


#: Carries a step out: where the recipe stands, options, what else is given → a plan, or None.
Act = Callable[[State, Any, Mapping[str, Any]], "Plan | None"]


def plain(path: str) -> Act:
    """An operation `f(source, options)`."""

    def act(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
        module, _, name = path.rpartition(".")
        operation = getattr(import_module(f"moe_compose.{module}"), name)
        plan: Plan = operation(state.source(given), options)
        return plan

    return act


def _routing(given: Mapping[str, Any], **more: Any) -> Any:
    from moe_compose.composition.options import RoutingOptions

    names = {"text_tokens": "tokens"} | {n: n for n in ("row_scale", "tolerance", "device")}
    found = {field: given[name] for name, field in names.items() if name in given}
    return RoutingOptions(**found, **more)


def compose_models(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.composition.compose import compose

    donors = {}
    for word in given["expert"]:
        name, _, model = word.partition("=")
        donors[name] = state.donor(model)
    texts = by_name(given.get("data", ()))
    routing = _routing(given, seed=options.seed)
    return compose(state.open(given["base"]), donors, options, texts, routing=routing)


def add(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.composition.change import add_expert
    from moe_compose.surgery.selection import moe_form

    source = state.source(given)
    name = options.name or str(moe_form(source)[1].num_experts)
    texts = by_name(given.get("data", ()), name)
    return add_expert(source, state.donor(given["from"]), options, texts, routing=_routing(given))


def swap(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.composition.change import swap_expert

    texts = by_name(given.get("data", ()), options.name or options.expert)
    donor = state.donor(given["from"])
    return swap_expert(state.source(given), donor, options, texts, routing=_routing(given))


def measure(state: State, options: Any, given: Mapping[str, Any]) -> None:
    from moe_compose.calibration.calibrate import calibrate

    place = Path(given.get("save", state.work / f"stats{len(list(state.work.iterdir()))}"))
    texts = read_texts(*given.get("domain", ()), *given.get("data", ()))
    source = state.source(given)
    state.stats = calibrate(source, texts, options, output=place, resume=state.resume)
    state.model = source


def _stats(state: State, given: Mapping[str, Any]) -> ExpertStats | None:
    from moe_compose.calibration.stats import ExpertStats

    return ExpertStats.load(given["stats"]) if "stats" in given else state.stats


def prune_experts(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.calibration.pruning import prune
    from moe_compose.surgery.prune_options import WITHOUT_STATS

    source = state.source(given)
    if options.criterion == "aimer":
        from moe_compose.calibration.aimer import rank_by_weights

        return prune(source, rank_by_weights(source), options)
    stats = None if options.criterion in WITHOUT_STATS else _stats(state, given)
    return prune(source, stats, options)


def merge_experts(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.calibration.merging import merge
    from moe_compose.calibration.sequence import merge_in_sequence

    source = state.source(given)
    if "domain" in given:
        return merge_in_sequence(source, read_texts(*given["domain"]), options)
    stats = _stats(state, given)
    if stats is None:
        raise OptionError(
            "merge needs statistics with similarities: a calibrate step with similarity: true "
            "before it, stats: FOLDER, or domain: {NAME: FILE}"
        )
    return merge(source, stats, options)


def refit_plan(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.recovery.refit import refit
    from moe_compose.surgery.plan import Plan

    if not isinstance(state.model, Plan) or state.before is None:
        raise OptionError("refit follows a step that prunes or merges, with nothing saved between")
    texts = read_texts(*given.get("domain", ()), *given.get("data", ()))
    return refit(state.model, state.before, texts, options)


def train(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.training.train import train_router

    source = state.source(given)
    teacher = state.open(given["teacher"]) if "teacher" in given else None
    if teacher is None and options.objective in ("distill", "layer"):
        teacher = state.before
    held = read_texts(*given["eval_data"]) if "eval_data" in given else None
    texts = read_texts(*given.get("domain", ()), *given.get("data", ()))
    return train_router(source, texts, options, teacher=teacher, held_out=held)
