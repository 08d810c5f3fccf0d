"""Placing experts: a model's own ones, and others' between them.

What is the model's own is a selection (`surgery.selection`), in which a foreign expert's place is
held by one of the model's. Here the holders' tensors are replaced by the foreign ones. So nothing
about the model's own experts changes: their bytes move, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_compose.architectures import Architecture, MoE
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.arithmetic import cast
from moe_compose.surgery.averages import Mix
from moe_compose.surgery.compatible import config_differences
from moe_compose.surgery.donors import Giver
from moe_compose.surgery.expert_names import set_names
from moe_compose.surgery.expert_options import MtpPolicy
from moe_compose.surgery.ffn import FFN, matrix
from moe_compose.surgery.indices import Rows
from moe_compose.surgery.pairing import stated_config, unmet
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.preservation import output_factor, split_factor
from moe_compose.surgery.roles import Role, Roles
from moe_compose.surgery.selection import Selected, moe_form, select_experts
from moe_compose.surgery.target import target_config
from moe_compose.surgery.transforms import Concat, Read, Reshape, Take, Transform
from moe_compose.surgery.upcycle_options import UpcycleOptions

#: Where a foreign expert's router row comes from: the expert that holds its place, or the donor.
Row = Literal["own", "trained"]


@dataclass(frozen=True)
class Place:
    """One expert of the result.

    Attributes:
        own: an expert of the model; of a foreign one, whose router row it starts with.
        giver: who gives the expert; None: it is the model's own.
        row: `trained` takes the donor's router row.
        fresh: it is one more expert, so that a correction bias starts at the layer's mean.
    """

    own: int
    giver: Giver | None = None
    row: Row = "own"
    fresh: bool = False


def place_experts(
    source: TensorSource,
    places: Sequence[Place],
    names: Sequence[str | None],
    *,
    mtp: MtpPolicy = "prune",
    key: str = "source",
) -> Selected:
    """Tensors and config of a model with these experts in every layer. Reads no weights.

    Args:
        source: an MoE.
        places: the experts of the result, in order.
        names: what they are called.
        mtp: as for `select_experts`; blocks of multi-token prediction keep own experts only.
        key: the plan's word for the source.

    Raises:
        UnsupportedError: a selection that the family cannot hold, or donors that do not fit; every
            difference named.
    """
    form, moe = moe_form(source)
    givers = {p.giver.key: p.giver for p in places if p.giver is not None}
    problems = [
        f"{giver.source.label}: {why}"
        for giver in givers.values()
        for why in _unfit(source, form, moe, giver)
    ]
    if problems:
        raise UnsupportedError(f"no expert of {source.label} can be made", problems=problems)
    ids = [p.own for p in places]
    selected = select_experts(source, dict.fromkeys(moe.sparse_layers, ids), mtp=mtp, key=key)
    placing = _Placing(source, form, moe, places, key)
    outputs = tuple(OutputTensor(o.name, placing.value(o)) for o in selected.outputs)
    if placing.problems:
        raise UnsupportedError(
            f"no expert of {source.label} can be made", problems=placing.problems[:20]
        )
    used = {(r.source, r.tensor.name) for o in outputs for r in o.value.leaves()}
    dropped = dict(selected.dropped)
    for name in source.tensors:
        if (key, name) not in used:
            dropped.setdefault(f"{key}:{name}", "its expert is replaced")
    for giver in givers.values():
        for other, them in giver.sources.items():
            left = (n for n in them.tensors if (other, n) not in used)
            dropped |= {f"{other}:{n}": "only an expert is taken" for n in left}
    config = dict(selected.config)
    set_names(config, names)
    return replace(selected, outputs=outputs, dropped=dropped, config=config)


def _unfit(source: TensorSource, form: Architecture, moe: MoE, giver: Giver) -> Iterator[str]:
    """Why a donor's expert cannot be one of this model's."""
    counts = {n for key in (form.num_experts, form.top_k) for n in (key.name, *key.aliases)} | {
        "quantization_config"
    }
    if giver.expert is not None:
        if giver.form.model_type != form.model_type:
            yield f"its experts are of {giver.form.model_type}, the model is a {form.model_type}"
        else:
            yield from config_differences(source.config, giver.source.config, besides=counts)
        return
    twin = form.twin_of(giver.form.model_type)
    if twin is None:
        yield f"a dense {giver.form.model_type} is no expert of a {form.model_type}"
        return
    stated = stated_config(giver.source.config, giver.form)
    if problems := unmet(stated, giver.form, form):
        yield from problems
        return
    options = UpcycleOptions(num_experts=moe.num_experts, top_k=moe.top_k)
    made = target_config(stated, giver.form, form, twin, options)
    shared = {k.name for k in (form.shared.width, form.shared.count) if k} if form.shared else set()
    yield from config_differences(
        {n: v for n, v in source.config.items() if n in made},
        {n: v for n, v in made.items() if n in source.config},
        besides=counts | shared | set(twin.config) | {"model_type"},
    )


class _Placing:
    """From the selection of placeholders to the experts themselves."""

    def __init__(
        self,
        source: TensorSource,
        form: Architecture,
        moe: MoE,
        places: Sequence[Place],
        key: str,
    ) -> None:
        self._source, self._form, self._moe, self._key = source, form, moe, key
        self._places, self._roles = places, Roles(form)
        self._layers = {self._roles.block(i): i for i in moe.sparse_layers}
        self._ffns: dict[tuple[str, int], FFN] = {}
        self.problems: list[str] = []

    def value(self, output: OutputTensor) -> Transform:
        """What an output of the selection becomes."""
        role = self._roles.of(output.name)
        layer = self._layers.get(role.block) if role else None
        if role is None or layer is None:
            return output.value
        if role.kind == "expert":
            place = self._places[role.expert] if role.expert < len(self._places) else None
            if place is None or place.giver is None:
                return output.value
            own = next(output.value.leaves()).tensor.name
            return self._foreign(place.giver, role, own, layer)
        if all(p.giver is None for p in self._places):
            return output.value
        if role.kind == "stacked":
            return self._stacked(output, role, layer)
        return self._router(output, role)

    def _foreign(self, giver: Giver, role: Role, own: str, layer: int) -> Transform:
        """A tensor of a foreign expert, stored apart."""
        like = self._source.tensors[own]
        if giver.expert is not None and giver.adapter is None:
            return self._same(giver, role.renamed(giver.expert), own)
        assert self._form.experts is not None
        for template in self._form.experts.names:
            if template.format(i=layer, e=role.expert) == role.renamed(role.expert):
                return self._cast(
                    matrix(self._form.experts, template, self._ffn(giver, layer)), own
                )
        self.problems.append(
            f"{like.name} belongs to quantised or biased experts, and {giver.source.label} gives "
            "plain matrices"
        )
        return Read(self._key, like)

    def _same(self, giver: Giver, name: str, own: str, *, rows: bool = False) -> Transform:
        """A donor's tensor that is just like one of ours; with `rows`, but for how many."""
        theirs, ours = giver.source.tensors.get(name), self._source.tensors[own]
        start = 1 if rows else 0
        if theirs is None:
            self.problems.append(f"{giver.source.label} has no {name}")
        elif (theirs.dtype, theirs.shape[start:]) != (ours.dtype, ours.shape[start:]):
            self.problems.append(
                f"{name} of {giver.source.label} is {theirs.dtype} {list(theirs.shape)}, the "
                f"model's {ours.dtype} {list(ours.shape)}"
            )
        else:
            return Read(giver.key, theirs)
        return Read(self._key, ours)

    def _cast(self, value: Transform, own: str) -> Transform:
        """Rounded to the dtype of the model's."""
        dtype = self._source.tensors[own].dtype
        if dtype == value.spec.dtype:
            return value
        if dtype in FLOAT_DTYPES and value.spec.dtype in FLOAT_DTYPES:
            return cast(value, dtype)
        self.problems.append(f"{own} is {dtype}: a {value.spec.dtype} expert cannot be like it")
        return value

    def _ffn(self, giver: Giver, layer: int) -> FFN:
        """A donor's matrices, scaled as the routing of the model needs it."""
        if (giver.key, layer) not in self._ffns:
            ffn = giver.ffn(layer)
            if giver.expert is None and self._moe.routing.sums_to is not None:
                options = UpcycleOptions(num_experts=self._moe.num_experts, top_k=self._moe.top_k)
                factor = output_factor(self._form, self._source.config, options)
                ffn = ffn.scaled(*split_factor(factor, 1))
            self._ffns[giver.key, layer] = ffn
        return self._ffns[giver.key, layer]

    def _stacked(self, output: OutputTensor, role: Role, layer: int) -> Transform:
        assert self._form.experts is not None
        ours = self._source.tensors[output.name]
        if not ours.shape or ours.shape[0] % self._moe.num_experts:
            return output.value
        each = ours.shape[0] // self._moe.num_experts
        template = next(
            (t for t in self._form.experts.names if t.format(i=layer) == output.name), None
        )

        def piece(place: Place) -> Transform:
            if place.giver is None:
                return Take(Read(self._key, ours), Rows(place.own * each, (place.own + 1) * each))
            giver = place.giver
            if giver.expert is not None and giver.adapter is None:
                return Take(
                    self._same(giver, output.name, output.name, rows=True),
                    Rows(giver.expert * each, (giver.expert + 1) * each),
                )
            if template is None:
                self.problems.append(f"{output.name} has no plain expert to take from a donor")
                return Take(Read(self._key, ours), Rows(0, each))
            value = matrix(self._form.experts, template, self._ffn(giver, layer))  # type: ignore[arg-type]
            return Reshape(self._cast(value, output.name), (each, *ours.shape[1:]))

        return Concat(tuple(piece(p) for p in self._places))

    def _router(self, output: OutputTensor, role: Role) -> Transform:
        """Rows of foreign experts, where they are not the holders'."""
        line, name = role.router, output.name
        if line is None or line.kind in ("other", "table") or line.dim or line.lead:
            return output.value
        ours = self._source.tensors[name]
        parts = [self._row(place, line.kind, name) for place in self._places]
        if all(part is None for part in parts):
            return output.value
        own = Read(self._key, ours)
        rows = [
            part or Take(own, Rows(p.own, p.own + 1))
            for p, part in zip(self._places, parts, strict=True)
        ]
        if ours.shape[0] > self._moe.num_experts:  # rows of no FFN stay behind the experts
            rows.append(Take(own, Rows(self._moe.num_experts, ours.shape[0])))
        return Concat(tuple(rows))

    def _row(self, place: Place, kind: str, name: str) -> Transform | None:
        """A foreign expert's row; None for the holder's."""
        giver, ours = place.giver, self._source.tensors[name]
        if giver is None:
            return None
        if place.row == "trained" and giver.expert is not None:
            same = self._same(giver, name, name, rows=True)
            return Take(same, Rows(giver.expert, giver.expert + 1))
        if kind == "correction_bias" and place.fresh:
            every = tuple(range(self._moe.num_experts))
            mean = Mix(Read(self._key, ours), (every,), ((1 / len(every),) * len(every),))
            return cast(mean, ours.dtype)
        return None


def sources_of(
    source: TensorSource, places: Sequence[Place], key: str = "source"
) -> dict[str, Any]:
    """Everything that a placing reads from, under the plan's words."""
    found: dict[str, Any] = {key: source}
    for place in places:
        if place.giver is not None:
            found |= place.giver.sources
    return found


def own_places(experts: int, foreign: Mapping[int, Place] | None = None) -> list[Place]:
    """All experts of a model in their places, some of them replaced."""
    return [(foreign or {}).get(e, Place(e)) for e in range(experts)]
