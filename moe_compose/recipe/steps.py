"""The steps of a recipe: the operations, under their command's names, with their options and what
they read beside these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal

from moe_compose.recipe.acts import (
    Act,
    add,
    compose_models,
    measure,
    merge_experts,
    plain,
    prune_experts,
    refit_plan,
    swap,
    train,
)
from moe_compose.recipe.inputs import Input
from moe_compose.reporting.steps import OPTIONS

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


_TEXTS = {
    "domain": Input("texts", "Text by domain, NAME: FILE."),
    "data": Input("texts", "Text of no particular domain."),
}

STEPS: Mapping[str, Step] = {
    "upcycle": Step(
        OPTIONS["upcycle"],
        plain("surgery.upcycle.upcycle"),
        "a dense checkpoint becomes a mixture of experts",
    ),
    "compose": Step(
        OPTIONS["compose"],
        compose_models,
        "independently trained models become the experts of one",
        {
            "base": Input("model", "A dense checkpoint, and expert 0.", required=True),
            "expert": Input("models", "NAME: MODEL, each an expert.", required=True),
            "data": Input("texts", "Text of the experts, NAME: FILE."),
            **_ROUTING,
        },
    ),
    "anchor": Step(
        OPTIONS["anchor"],
        plain("surgery.anchor.anchor"),
        "the pair that an expert is trained in",
    ),
    "add-expert": Step(OPTIONS["add-expert"], add, "one more expert", _FROM),
    "swap-expert": Step(OPTIONS["swap-expert"], swap, "another expert in the place of one", _FROM),
    "remove-expert": Step(
        OPTIONS["remove-expert"],
        plain("composition.change.remove_expert"),
        "experts leave, and every trace of their text",
    ),
    "expand": Step(OPTIONS["expand"], plain("surgery.expand.expand"), "every expert repeated"),
    "extract": Step(
        OPTIONS["extract"],
        plain("surgery.extract.extract"),
        "one expert as a dense checkpoint",
    ),
    "calibrate": Step(
        "calibration.options.CalibrateOptions",
        measure,
        "measure what each expert does on text, for the steps that follow",
        _TEXTS,
        "statistics",
    ),
    "prune": Step(
        OPTIONS["prune"],
        prune_experts,
        "fewer experts",
        {"stats": Input("folder", "Statistics; by default of the calibrate step before.")},
    ),
    "merge": Step(
        OPTIONS["merge"],
        merge_experts,
        "alike experts become weighted means",
        {
            "stats": Input("folder", "Statistics; by default of the calibrate step before."),
            "domain": Input("texts", "Text to merge by in sequence, NAME: FILE."),
        },
    ),
    "refit": Step(
        "recovery.options.RefitOptions",
        refit_plan,
        "down-projections refitted to what was before",
        _TEXTS,
    ),
    "train-router": Step(
        OPTIONS["train-router"],
        train,
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
