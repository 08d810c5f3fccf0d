"""What there is to choose from: families, and methods of every operation, as `moe-compose ls` shows
them.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from moe_compose.architectures import Architecture, all_architectures
from moe_compose.architectures.base import REQUIRED, Key
from moe_compose.architectures.routing_form import Routing, RoutingForm
from moe_compose.surgery.compose_options import ROUTERS, SHARED
from moe_compose.surgery.merge_options import MERGE_METHODS
from moe_compose.surgery.prune_options import CRITERIA, OF_MASKED, WITHOUT_STATS
from moe_compose.surgery.upcycle_options import METHODS


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """A family in short.

    Attributes:
        family: `model_type`.
        kind: `dense` or `MoE`.
        hf_class: the transformers class.
        experts: how they lie on disk; empty for a dense family.
        routing: in words, as it is where the config is silent; empty for a dense family.
        decided_by: config entries that can change the routing.
        grown_from: dense families that `upcycle` makes it from.
        grows_into: MoE families that it can be made into.
        note: anything a reader should know.
    """

    family: str
    kind: str
    hf_class: str
    experts: str
    routing: str
    decided_by: tuple[str, ...]
    grown_from: tuple[str, ...]
    grows_into: tuple[str, ...]
    note: str


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A method of an operation, a criterion of `prune` among them, in short.

    Attributes:
        operation: the command.
        method: its name there.
        summary: what it does, or keeps.
        preservation: the class that it aims at.
        needs: what it takes beside the checkpoint.
        paper: name and arXiv id, or `baseline`.
    """

    operation: str
    method: str
    summary: str
    preservation: str
    needs: str
    paper: str


#: What ways of composing take.
_EVIDENCE = {
    **dict.fromkeys(("best", "ridge", "hidden"), "text"),
    "trained": "anchored pairs",
    "domain": "--embeddings",
    "weighted": "--weight",
}


def families() -> list[FamilyRow]:
    """Every known family, in the order of the registry."""
    forms = all_architectures().values()
    return [
        FamilyRow(
            family=form.model_type,
            kind="MoE" if form.is_moe else "dense",
            hf_class=form.hf_class,
            experts=_layout(form),
            routing=_routing(form.routing) if form.routing else "",
            decided_by=tuple(key.name for key in _keys(form.routing)) if form.routing else (),
            grown_from=tuple(twin.dense for twin in form.twins),
            grows_into=tuple(a.model_type for a in forms if a.twin_of(form.model_type)),
            note=form.note,
        )
        for form in forms
    ]


def methods() -> list[MethodRow]:
    """Every method, operation by operation."""
    return [
        *(
            MethodRow("upcycle", name, info.summary, info.preserves, "nothing", info.paper)
            for name, info in METHODS.items()
        ),
        *(
            MethodRow("compose --shared", name, what, "none", _EVIDENCE.get(name, "nothing"), paper)
            for name, (what, paper) in SHARED.items()
        ),
        *(
            MethodRow("compose --router", name, what, "none", _EVIDENCE.get(name, "nothing"), paper)
            for name, (what, paper) in ROUTERS.items()
        ),
        *(
            MethodRow("prune", name, f"keeps {what}", "none", _needs(name), paper)
            for name, (what, paper) in CRITERIA.items()
        ),
        *(
            MethodRow("merge", name, what, "none", "calibrate --similarity, or text", paper)
            for name, (what, paper) in MERGE_METHODS.items()
        ),
    ]


def _needs(criterion: str) -> str:
    """What a criterion of `prune` takes."""
    if criterion == "given":
        return "--ranking"
    if criterion in WITHOUT_STATS:
        return "nothing"
    return "calibrate --loo-tokens" if criterion in OF_MASKED else "calibrate"


def _layout(form: Architecture) -> str:
    """How experts lie on disk, in a few words; `fused`: gate and up in one tensor."""
    if form.experts is None:
        return ""
    e = form.experts
    words = ["stacked" if e.stacked else "one by one"]
    words += ["fused"] if e.gate_up else []
    words += ["interleaved"] if e.interleaved else []
    words += ["transposed"] if e.transposed else []
    words += ["biases"] if e.biases else []
    words += ["shared"] if form.shared else []
    return ", ".join(words)


def _routing(form: RoutingForm) -> str:
    """The routing in words, as it is where the config is silent."""
    values: dict[str, Any] = {}
    for field in fields(RoutingForm):
        value = getattr(form, field.name)
        values[field.name] = _default(value, field.default) if isinstance(value, Key) else value
    return Routing(**values).describe()


def _keys(form: RoutingForm) -> list[Key]:
    """The config entries that a family's routing depends on."""
    values = (getattr(form, field.name) for field in fields(RoutingForm))
    return [value for value in values if isinstance(value, Key)]


def _default(key: Key, otherwise: Any) -> Any:
    """What an absent entry means; of one that must be there, the first value the form knows."""
    if key.default is not REQUIRED:
        return key.get({})
    if key.values:
        return next(iter(key.values.values()))
    return None if otherwise is MISSING else otherwise
