"""Merge: an MoE whose experts are weighted means of groups of its source's.

Each group's neurons are put in the order of its representative's, then gate, up and down are
averaged, in fp64, rounded once. Router row, biases and scales of a group are its representative's,
or the same mean. Experts that stay alone keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from moe_compose.architectures import Architecture, MoE
from moe_compose.checkpoint.quantisation import stated_quantisation
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.arithmetic import cast
from moe_compose.surgery.averages import Mean, Mix
from moe_compose.surgery.groups import ExpertGroups, Grouping
from moe_compose.surgery.merge_options import (
    MergeOptions,
    allowed_counts,
    merge_option_problems,
)
from moe_compose.surgery.neurons import part_of, templates_of
from moe_compose.surgery.plan import UNTRAINED, OutputTensor, Plan, Preservation
from moe_compose.surgery.prune import count_note
from moe_compose.surgery.roles import Role, Roles
from moe_compose.surgery.selection import Selected, group_problem, moe_form, select_experts
from moe_compose.surgery.sizing import count_within, size_note
from moe_compose.surgery.tables import Regroup, Renumber
from moe_compose.surgery.transforms import Concat, Take, Transform

#: What was merged with what, beside the result.
REPORT_NAME = "merging.json"

_KEY = "source"


def check_merge_options(source: TensorSource, options: MergeOptions) -> MergeOptions:
    """Raise all faults of the options together, before anything is read to group experts by.

    Returns:
        The options; with the largest `keep` that stays within `size`, where that is asked.

    Raises:
        OptionError: options that cannot be meant.
        UnsupportedError: no MoE, one whose experts cannot be selected, or a quantised one.
    """
    _, moe = moe_form(source)
    if problems := list(merge_option_problems(options, moe)):
        raise OptionError(f"cannot merge experts of {source.label} like this", problems=problems)
    if options.size is not None:
        counts = allowed_counts(options, moe)
        count = count_within(source, options.size, counts, options.mtp)
        options = replace(options, keep=count, size=None)
    if options.keep != moe.num_experts:
        _refuse_quantised(source)
    return options


def merge_grouped(source: TensorSource, grouping: Grouping, options: MergeOptions) -> Plan:
    """Plan an MoE of merged experts. Reads no weights.

    Args:
        source: an MoE; not a quantised one, unless no group has two experts.
        grouping: which experts become one, and how their neurons correspond.
        options: what to do about routers and multi-token prediction.

    Returns:
        A checked plan. `plan.decided` holds groups and weights.

    Raises:
        OptionError: options that cannot be meant, or a grouping of something else; all faults.
        UnsupportedError: experts of this family, or these tensors, cannot be merged.
    """
    form, moe = moe_form(source)
    problems = [
        *merge_option_problems(options, moe),
        *grouping.problems(moe.num_experts, moe.sparse_layers),
    ]
    problems = problems or list(_homeless(grouping, options, moe))
    if problems:
        raise OptionError(f"cannot merge experts of {source.label} like this", problems=problems)
    trivial = all(g.trivial for g in grouping.layers.values())
    if not trivial:
        _refuse_quantised(source)
    chosen = {layer: g.representatives for layer, g in grouping.layers.items()}
    selected = select_experts(source, chosen, mtp=options.mtp, key=_KEY)
    merging = _Merging(source, form, moe, grouping, options.router)
    outputs = tuple(OutputTensor(o.name, merging.value(o)) for o in selected.outputs)
    if merging.problems:
        raise UnsupportedError(
            f"experts of {source.label} cannot be merged", problems=merging.problems[:20]
        )
    used = {f"{r.source}:{r.tensor.name}" for o in outputs for r in o.value.leaves()}
    plan = Plan(
        operation="merge",
        options=asdict(options),
        config=selected.config,
        outputs=outputs,
        sources={_KEY: source},
        preservation=_preservation(trivial, moe, len(next(iter(chosen.values())))),
        files={n: p for n, p in source.files.items() if n not in ("README.md", REPORT_NAME)},
        dropped={name: why for name, why in selected.dropped.items() if name not in used},
        notes=(
            *_notes(form, moe, grouping, selected, options),
            *([] if trivial else [_size(source, outputs, chosen)]),
        ),
        card=source.files.get("README.md"),
        decided=_decided(grouping, selected),
        reports={REPORT_NAME: _report(grouping)},
    )
    return plan.check()


def _size(
    source: TensorSource, outputs: Sequence[OutputTensor], chosen: Mapping[int, Sequence[int]]
) -> str:
    nbytes = sum(o.info.nbytes for o in outputs)
    return size_note(source, nbytes, len(next(iter(chosen.values()))))


def any_grouping(moe: MoE, options: MergeOptions) -> Grouping:
    """Groups of the right number that the router allows, until the real ones are known."""
    assert options.keep is not None
    routers = moe.routing.groups if moe.routing.grouped else 1
    size, each, groups = moe.num_experts // routers, options.keep // routers, []
    for first in range(0, moe.num_experts, size):
        alone = [[e] for e in range(first, first + each)]
        alone[0] += range(first + each, first + size)
        groups += alone
    found = ExpertGroups.of(groups, [1.0] * moe.num_experts)
    return Grouping(method=options.method, layers=dict.fromkeys(moe.sparse_layers, found))


def merge_unmeasured(source: TensorSource, options: MergeOptions) -> Plan:
    """The plan as far as it is known before anything is measured: its names and shapes.

    Raises:
        OptionError, UnsupportedError: as `merge_grouped`.
    """
    options = check_merge_options(source, options)
    return merge_grouped(source, any_grouping(moe_form(source)[1], options), options)


class _Merging:
    """From the selection of the representatives to the means of their groups."""

    def __init__(
        self, source: TensorSource, form: Architecture, moe: MoE, grouping: Grouping, router: str
    ) -> None:
        assert form.experts is not None
        self._source, self._moe, self._lie = source, moe, form.experts
        self._grouping, self._mean_rows = grouping, router == "mean"
        self._roles = Roles(form)
        self._layers = {self._roles.block(i): i for i in grouping.layers}
        self.problems: list[str] = []

    def value(self, output: OutputTensor) -> Transform:
        """What an output of the selection becomes."""
        role = self._roles.of(output.name)
        layer = None if role is None else self._layers.get(role.block)
        if role is None or layer is None or self._grouping.layers[layer].trivial:
            return output.value
        groups = self._grouping.layers[layer]
        if role.kind == "router":
            return self._router(output, role, groups)
        if role.kind == "expert" and (
            role.expert >= len(groups.members) or len(groups.members[role.expert]) == 1
        ):
            return output.value
        template = self._template(output.name, layer, role)
        if template is None:
            if role.kind == "expert" or next(iter(output.value.leaves())).tensor.numel > 1:
                self.problems.append(f"{output.name} is no matrix of an expert: it has no mean")
            return output.value
        if role.kind == "expert":
            return self._mean(template, layer, groups, role.expert)
        parts = (self._mean(template, layer, groups, j) for j in range(len(groups.members)))
        return Concat(tuple(parts))

    def _template(self, name: str, layer: int, role: Role) -> str | None:
        """The form's template of an expert's tensor."""
        named = (t for t in templates_of(self._lie) if t.format(i=layer, e=role.expert) == name)
        return next(named, None)

    def _mean(self, template: str, layer: int, groups: ExpertGroups, group: int) -> Transform:
        """One expert of the result, in one of its tensors."""
        orders, xs = self._grouping.orders.get(layer, {}), []
        for e in groups.members[group]:
            info = self._source.tensors[template.format(i=layer, e=e)]
            part = part_of(self._lie, template, info, e, self._moe.num_experts, _KEY)
            xs.append(part.ordered(orders.get(e)))
        if len(xs) == 1:
            return xs[0]
        return cast(Mean(tuple(xs), groups.weights[group]), xs[0].spec.dtype)

    def _router(self, output: OutputTensor, role: Role, groups: ExpertGroups) -> Transform:
        line, value = role.router, output.value
        assert line is not None
        if isinstance(value, Renumber):
            return Regroup(value.x, groups.labels)
        if not self._mean_rows or line.kind in ("other", "table") or not isinstance(value, Take):
            return value
        experts = self._moe.num_experts
        rest = range(experts, experts + self._moe.zero_experts)
        members = (*groups.members, *((e,) for e in rest))
        weights = (*groups.weights, *((1.0,) for _ in rest))
        return cast(Mix(value.x, members, weights, line.dim), value.spec.dtype)


def _refuse_quantised(source: TensorSource) -> None:
    """Means of packed values mean nothing."""
    roles = Roles(moe_form(source)[0])
    packed = (
        n
        for n, t in source.tensors.items()
        if t.dtype not in FLOAT_DTYPES and (role := roles.of(n)) and role.kind != "router"
    )
    name = next(packed, None)
    if name is not None or stated_quantisation(source) is not None:
        what = f", such as {name} ({source.tensors[name].dtype})" if name else ""
        raise UnsupportedError(
            f"experts of {source.label} cannot be merged: the checkpoint is quantised{what}, and "
            "packed values have no mean",
            hint="Merge the checkpoint that it was quantised from, and quantise the result.",
        )


def _homeless(grouping: Grouping, options: MergeOptions, moe: MoE) -> Iterator[str]:
    """Groups that the router's own groups of experts, or the options, do not allow."""
    routers = moe.routing.groups if moe.routing.grouped else 1
    size = moe.num_experts // routers
    for layer, groups in grouping.layers.items():
        if len(groups.members) != options.keep:
            yield f"layer {layer}: {len(groups.members)} groups, keep says {options.keep}"
        elif wrong := [g for g in groups.members if len({e // size for e in g}) > 1]:
            yield f"layer {layer}: experts {list(wrong[0])} are of different groups of the router"
        elif problem := group_problem(moe, groups.representatives):
            yield f"layer {layer}: {problem}"


def _preservation(trivial: bool, moe: MoE, count: int) -> Preservation:
    if trivial:
        return Preservation("exact", "no expert is merged")
    return Preservation(
        "none",
        f"{moe.num_experts} experts a layer become {count}, means of those that are alike; a mean "
        "of different experts computes what neither did",
    )


def _decided(grouping: Grouping, selected: Selected) -> dict[str, Any]:
    """For the record: groups, the representative first, and the weights of their means."""
    layers = sorted(grouping.layers.items())
    decided: dict[str, Any] = {
        "method": grouping.method,
        "of": dict(grouping.of),
        "aligned": grouping.aligned or "none",
        "groups": {str(i): [list(g) for g in groups.members] for i, groups in layers},
        "weights": {str(i): [list(w) for w in groups.weights] for i, groups in layers},
    }
    if selected.mtp:
        decided["kept_mtp"] = {block: list(ids) for block, ids in selected.mtp.items()}
    return decided


def _report(grouping: Grouping) -> dict[str, Any]:
    """Layer → its groups: members, weights, and how many neurons of each were moved."""
    found: dict[str, list[dict[str, Any]]] = {}
    for layer, groups in sorted(grouping.layers.items()):
        orders = grouping.orders.get(layer, {})
        found[str(layer)] = [
            {
                "experts": list(members),
                "weights": list(weights),
                "neurons_moved": [orders[e].moved if e in orders else 0 for e in members],
            }
            for members, weights in zip(groups.members, groups.weights, strict=True)
        ]
    return {
        "method": grouping.method,
        "of": dict(grouping.of),
        "aligned": grouping.aligned or "none",
        "layers": found,
    }


def _notes(
    form: Architecture, moe: MoE, grouping: Grouping, selected: Selected, options: MergeOptions
) -> Iterator[str]:
    yield UNTRAINED
    yield from grouping.notes
    count = len(next(iter(grouping.layers.values())).members)
    if count == moe.num_experts:
        return
    sizes = [len(g) for groups in grouping.layers.values() for g in groups.members]
    alone = sum(size == 1 for size in sizes)
    yield f"{alone} of {len(sizes)} experts stay alone; the largest group has {max(sizes)}"
    if note := count_note(form, count):
        yield note
    if selected.mtp and options.mtp == "prune":
        yield (
            f"multi-token prediction ({', '.join(selected.mtp)}) keeps the experts with the ids of "
            "the last layer's representatives, unmerged: nothing was measured there"
        )
    if any(t.kind == "table" for t in form.router) and moe.routing.hashed_layers:
        yield (
            f"{moe.routing.hashed_layers} layers route by token id: a token goes to the groups of "
            "its experts, and where two of them came into one, to the next one as well"
        )
