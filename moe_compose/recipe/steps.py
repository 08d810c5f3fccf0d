"""The steps of a recipe: the operations, under their command's names, with their options and what
they read and write beside these. Every key is a flag of the command, or one of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from moe_compose.recipe.acts import Act, add, compose_models, plain, swap, train
from moe_compose.recipe.fewer import merge_experts, prune_experts
from moe_compose.recipe.findings import judge, measure, pack, plan_bits, tell, weigh
from moe_compose.recipe.inputs import Input
from moe_compose.recipe.recovery import compared_on, refit_plan
from moe_compose.reporting.steps import OPTIONS

_SOURCE = {
    "source": Input("model", "What the step starts from; by default the result of the one before.")
}
_SAVE = {"save": Input("save", "Write the result here, and go on from it.")}
_ROUTING = {
    "text_tokens": Input("whole", "Tokens of each expert's text."),
    "row_scale": Input("number", "Length of router rows; by default searched."),
    "device": Input("text", "Where text is run: cpu, cuda."),
}
_FROM = {
    "from": Input("donor", "Where the new expert comes from.", required=True),
    "data": Input("texts", "Text of experts, NAME: FILE; without a name, the new expert's."),
    "tolerance": Input("number", "Nats that the loss of other domains may rise by."),
    **_ROUTING,
}
_TEXTS = {
    "domain": Input("texts", "Text by domain, NAME: FILE."),
    "data": Input("texts", "Text of no particular domain."),
}
_STATS = {"stats": Input("stats", "Statistics; by default of the calibrate step before.")}
_REFIT = {
    "refit": Input("flag", "Refit the down-projections of the experts that stay."),
    "refit_on": Input("texts", "Text to refit to, which the result is not judged on."),
    "refit_tokens": Input("whole", "Tokens of it."),
}
_MAX_KL = {"max_kl": Input("number", "Largest mean KL on held-out text, in nats per token.")}
_OUT = {"out": Input("out", "A file for the figures.")}


@dataclass(frozen=True)
class Step:
    """A kind of step.

    Attributes:
        options: where its options dataclass is: module and name; empty: it has none.
        act: what it does.
        summary: one line.
        inputs: what it reads and writes beside its options.
        without: fields of the options that mean nothing here.
        makes: a plan of a model, or something else.
        mends: its result is held to what came before the step that it follows.
        compared_on: of what is given, text that its result is compared with its source on.
    """

    options: str
    act: Act
    summary: str
    inputs: Mapping[str, Input] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    makes: Literal["plan", "finding"] = "plan"
    mends: bool = False
    compared_on: Callable[[Mapping[str, Any]], Path | None] = lambda _: None

    @property
    def options_class(self) -> type | None:
        """The dataclass."""
        module, _, name = self.options.rpartition(".")
        if not module:
            return None
        found: type = getattr(import_module(f"moe_compose.{module}"), name)
        return found

    @property
    def fields(self) -> tuple[Field[Any], ...]:
        """Of the options, those that mean something."""
        cls: Any = self.options_class
        return () if cls is None else tuple(f for f in fields(cls) if f.name not in self.without)


def operation(name: str, act: Act, summary: str, **inputs: Input) -> Step:
    """A step that makes a model of another."""
    return Step(OPTIONS[name], act, summary, {**_SOURCE, **inputs, **_SAVE})


STEPS: Mapping[str, Step] = {
    "upcycle": operation(
        "upcycle",
        plain("surgery.upcycle.upcycle"),
        "a dense checkpoint becomes a mixture of experts",
    ),
    "compose": Step(
        OPTIONS["compose"],
        compose_models,
        "independently trained models become the experts of one",
        {
            "base": Input("model", "A dense checkpoint, and expert 0."),
            "expert": Input("donors", "NAME: MODEL, each an expert."),
            "from_mergekit": Input("file", "A config of mergekit-moe, instead of these two."),
            "data": Input("texts", "Text of the experts, NAME: FILE."),
            "embeddings": Input("file", "For router domain: an embedding of each expert's text."),
            **_ROUTING,
            **_SAVE,
        },
    ),
    "anchor": operation(
        "anchor", plain("surgery.anchor.anchor"), "the pair that an expert is trained in"
    ),
    "add-expert": operation("add-expert", add, "one more expert", **_FROM),
    "swap-expert": operation("swap-expert", swap, "another expert in the place of one", **_FROM),
    "remove-expert": operation(
        "remove-expert",
        plain("composition.change.remove_expert"),
        "experts leave, and every trace of their text",
    ),
    "expand": operation("expand", plain("surgery.expand.expand"), "every expert repeated"),
    "extract": operation(
        "extract", plain("surgery.extract.extract"), "one expert as a dense checkpoint"
    ),
    "prune": replace(
        operation("prune", prune_experts, "fewer experts", **_STATS, **_TEXTS, **_MAX_KL, **_REFIT),
        compared_on=compared_on,
    ),
    "merge": operation(
        "merge",
        merge_experts,
        "alike experts become weighted means",
        **_STATS,
        domain=Input("texts", "Text to merge by in sequence, NAME: FILE."),
        tokens=Input("whole", "Tokens of it."),
        seq_len=Input("whole", "Longest sequence of it."),
        sample=Input("whole", "Tokens of it on which experts are compared."),
        **_REFIT,
    ),
    "refit": Step(
        "recovery.options.RefitOptions",
        refit_plan,
        "down-projections refitted to what was before",
        {**_TEXTS, **_SAVE},
        mends=True,
    ),
    "train-router": operation(
        "train-router",
        train,
        "routers, alone or with more, trained on text",
        **_TEXTS,
        eval_data=Input("texts", "Held-out text."),
        teacher=Input("model", "For distill and layer; by default the model before."),
        adapter_out=Input("save", "Keep trained adapters here; by default they are merged."),
    ),
    "pack-expert": Step(
        "",
        pack,
        "one expert as a small checkpoint of its own",
        {
            **_SOURCE,
            "expert": Input("text", "Of a mixture: which, by name or number."),
            "base": Input("model", "Of a dense source: the model that it was trained from."),
            "name": Input("text", "What the expert is called."),
            "target": Input("text", "Of a dense source: the MoE family that it is for."),
            "data": Input("texts", "Text of the expert, of which only statistics go along."),
            **{n: _ROUTING[n] for n in ("text_tokens", "device")},
            "save": Input("save", "Folder of the packed expert.", required=True),
        },
        makes="finding",
    ),
    "calibrate": Step(
        "calibration.options.CalibrateOptions",
        measure,
        "measure what each expert does on text, for the steps that follow",
        {**_SOURCE, **_TEXTS, "save": Input("save", "Keep the statistics here.")},
        makes="finding",
    ),
    "evaluate": Step(
        "evaluation.options.EvaluateOptions",
        judge,
        "held-out loss, and the distance to another model",
        {**_SOURCE, "against": Input("model", "A reference to compare with."), **_TEXTS, **_OUT},
        makes="finding",
    ),
    "sweep": Step(
        "evaluation.options.EvaluateOptions",
        weigh,
        "quality against size of pruned models that are never written",
        {
            **_SOURCE,
            **_STATS,
            **_TEXTS,
            "ratios": Input("text", "Fractions of the experts to remove: 0.25,0.5."),
            "criteria": Input("text", "What makes an expert worth keeping: reap,easy-ep."),
            **_MAX_KL,
            **_REFIT,
            **_OUT,
            "plot": Input("out", "A picture: .png, .svg or .pdf."),
        },
        without=("greedy",),
        makes="finding",
    ),
    "quant-plan": Step(
        "calibration.quant_options.QuantPlanOptions",
        plan_bits,
        "how many bits each expert needs, as a recipe for llm-compressor",
        {**_SOURCE, **_STATS, "out": Input("save", "Folder of both files.")},
        makes="finding",
    ),
    "report": Step(
        "",
        tell,
        "one HTML page about a checkpoint",
        {
            **_SOURCE,
            "out": Input("out", "The page, a file that ends in .html.", required=True),
            "stats": Input("stats", "Also show these statistics."),
            "sweep": Input("file", "Also show what a sweep found."),
        },
        makes="finding",
    ),
}
