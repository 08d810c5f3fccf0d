"""The steps of a recipe: the operations, under their command's names, with their options and what
they read beside these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_compose.calibration.data import read_texts
from moe_compose.errors import OptionError
from moe_compose.recipe.inputs import Input, by_name

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

_SOURCE = Input("model", "What the step starts from; by default the result of the one before.")
_ROUTING = {
    "text_tokens": Input("whole", "Tokens of each expert's text."),
    "row_scale": Input("number", "Length of router rows; by default searched."),
    "device": Input("text", "Where text is run: cpu, cuda."),
}
_FROM = {
    "from": Input("model", "Where the new expert comes from.", required=True),
    "data": Input("texts", "Text of experts, NAME: FILE; without a name, the new expert's."),
    "tolerance": Input("number", "Nats that the loss of other domains may rise by."),
    **_ROUTING,
}


@dataclass(frozen=True)
class Step:
    """A kind of step.

    Attributes:
        options: where its options dataclass is: module and name; empty: it has none.
        act: what it does.
        inputs: what it reads beside its options.
        makes: a plan, or statistics.
        summary: one line.
    """

    options: str
    act: Act
    summary: str
    inputs: Mapping[str, Input] = field(default_factory=dict)
    makes: Literal["plan", "statistics"] = "plan"

    @property
    def options_class(self) -> type | None:
        """The dataclass."""
        module, _, name = self.options.rpartition(".")
        if not module:
            return None
        found: type = getattr(import_module(f"moe_compose.{module}"), name)
        return found


def _plain(path: str) -> Act:
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


def _compose(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.composition.compose import compose

    donors = {}
    for word in given["expert"]:
        name, _, model = word.partition("=")
        donors[name] = state.donor(model)
    texts = by_name(given.get("data", ()))
    routing = _routing(given, seed=options.seed)
    return compose(state.open(given["base"]), donors, options, texts, routing=routing)


def _add(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.composition.change import add_expert
    from moe_compose.surgery.selection import moe_form

    source = state.source(given)
    name = options.name or str(moe_form(source)[1].num_experts)
    texts = by_name(given.get("data", ()), name)
    return add_expert(source, state.donor(given["from"]), options, texts, routing=_routing(given))


def _swap(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.composition.change import swap_expert

    texts = by_name(given.get("data", ()), options.name or options.expert)
    donor = state.donor(given["from"])
    return swap_expert(state.source(given), donor, options, texts, routing=_routing(given))


def _calibrate(state: State, options: Any, given: Mapping[str, Any]) -> None:
    from moe_compose.calibration.calibrate import calibrate

    place = Path(given.get("save", state.work / f"stats{len(list(state.work.iterdir()))}"))
    texts = read_texts(*given.get("domain", ()), *given.get("data", ()))
    source = state.source(given)
    state.stats = calibrate(source, texts, options, output=place, resume=state.resume)
    state.model = source


def _stats(state: State, given: Mapping[str, Any]) -> ExpertStats | None:
    from moe_compose.calibration.stats import ExpertStats

    return ExpertStats.load(given["stats"]) if "stats" in given else state.stats


def _prune(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.calibration.pruning import prune
    from moe_compose.surgery.prune_options import WITHOUT_STATS

    source = state.source(given)
    if options.criterion == "aimer":
        from moe_compose.calibration.aimer import rank_by_weights

        return prune(source, rank_by_weights(source), options)
    stats = None if options.criterion in WITHOUT_STATS else _stats(state, given)
    return prune(source, stats, options)


def _merge(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
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


def _refit(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.recovery.refit import refit
    from moe_compose.surgery.plan import Plan

    if not isinstance(state.model, Plan) or state.before is None:
        raise OptionError("refit follows a step that prunes or merges, with nothing saved between")
    texts = read_texts(*given.get("domain", ()), *given.get("data", ()))
    return refit(state.model, state.before, texts, options)


def _train(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
    from moe_compose.training.train import train_router

    source = state.source(given)
    teacher = state.open(given["teacher"]) if "teacher" in given else None
    if teacher is None and options.objective in ("distill", "layer"):
        teacher = state.before
    held = read_texts(*given["eval_data"]) if "eval_data" in given else None
    texts = read_texts(*given.get("domain", ()), *given.get("data", ()))
    return train_router(source, texts, options, teacher=teacher, held_out=held)


_TEXTS = {
    "domain": Input("texts", "Text by domain, NAME: FILE."),
    "data": Input("texts", "Text of no particular domain."),
}

STEPS: Mapping[str, Step] = {
    "upcycle": Step(
        "surgery.upcycle_options.UpcycleOptions",
        _plain("surgery.upcycle.upcycle"),
        "a dense checkpoint becomes a mixture of experts",
    ),
    "compose": Step(
        "surgery.compose_options.ComposeOptions",
        _compose,
        "independently trained models become the experts of one",
        {
            "base": Input("model", "A dense checkpoint, and expert 0.", required=True),
            "expert": Input("models", "NAME: MODEL, each an expert.", required=True),
            "data": Input("texts", "Text of the experts, NAME: FILE."),
            **_ROUTING,
        },
    ),
    "anchor": Step(
        "surgery.anchor.AnchorOptions",
        _plain("surgery.anchor.anchor"),
        "the pair that an expert is trained in",
    ),
    "add-expert": Step("surgery.add_expert.AddOptions", _add, "one more expert", _FROM),
    "swap-expert": Step(
        "surgery.swap_expert.SwapOptions", _swap, "another expert in the place of one", _FROM
    ),
    "remove-expert": Step(
        "surgery.remove_expert.RemoveOptions",
        _plain("composition.change.remove_expert"),
        "experts leave, and every trace of their text",
    ),
    "expand": Step(
        "surgery.expand.ExpandOptions", _plain("surgery.expand.expand"), "every expert repeated"
    ),
    "extract": Step(
        "surgery.extract_options.ExtractOptions",
        _plain("surgery.extract.extract"),
        "one expert as a dense checkpoint",
    ),
    "calibrate": Step(
        "calibration.options.CalibrateOptions",
        _calibrate,
        "measure what each expert does on text, for the steps that follow",
        _TEXTS,
        "statistics",
    ),
    "prune": Step(
        "surgery.prune_options.PruneOptions",
        _prune,
        "fewer experts",
        {"stats": Input("folder", "Statistics; by default of the calibrate step before.")},
    ),
    "merge": Step(
        "surgery.merge_options.MergeOptions",
        _merge,
        "alike experts become weighted means",
        {
            "stats": Input("folder", "Statistics; by default of the calibrate step before."),
            "domain": Input("texts", "Text to merge by in sequence, NAME: FILE."),
        },
    ),
    "refit": Step(
        "recovery.options.RefitOptions",
        _refit,
        "down-projections refitted to what was before",
        _TEXTS,
    ),
    "train-router": Step(
        "training.options.TrainOptions",
        _train,
        "routers, alone or with more, trained on text",
        {
            **_TEXTS,
            "eval_data": Input("texts", "Held-out text."),
            "teacher": Input("model", "For distill and layer; by default the model before."),
        },
    ),
}

#: What every step may have.
COMMON: Mapping[str, Input] = {
    "source": _SOURCE,
    "save": Input("folder", "Write the result here, and go on from it."),
}


def inputs_of(step: Step) -> dict[str, Input]:
    """Everything that a step reads beside its options."""
    return {**COMMON, **step.inputs}
