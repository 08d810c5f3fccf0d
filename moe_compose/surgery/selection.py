"""Selecting experts: which of a checkpoint's experts the result has, in which order, how often.

Pruning, removing, permuting and repeating experts are all this, and nothing else: names change,
rows of stacked tensors and of routers are taken, and no value is computed. So bytes only move,
whatever the dtype; scales and packed weights go with their experts. What counts experts in
`config.json` follows. The one exception are tables of expert ids (`surgery.tables`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args

from moe_compose.architectures import Architecture, MoE, find
from moe_compose.architectures.dialects import both_dialects
from moe_compose.architectures.parts import Locator, layout_of
from moe_compose.checkpoint.source import TensorInfo, TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.expert_names import names_of, set_names
from moe_compose.surgery.expert_options import MtpPolicy
from moe_compose.surgery.indices import Picks, Rows
from moe_compose.surgery.plan import OutputTensor
from moe_compose.surgery.roles import NUMBERED, Role, Roles
from moe_compose.surgery.selected_config import rename_modules, with_count, without_mtp
from moe_compose.surgery.shared_tensors import natural
from moe_compose.surgery.tables import Renumber
from moe_compose.surgery.transforms import Concat, Read, Take, Transform

#: What only transformers 5 writes; older readers take defaults in its place without a word.
_NEW_DIALECT = ("rope_parameters", "dtype")

#: Faults that are listed one by one.
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Selected:
    """What a selection makes of a checkpoint.

    Attributes:
        outputs: every tensor of the result, in natural order.
        config: its `config.json`.
        dropped: `source:tensor` → why it is not used.
        mtp: the selection made in blocks of multi-token prediction that have experts.
    """

    outputs: tuple[OutputTensor, ...]
    config: dict[str, Any]
    dropped: dict[str, str]
    mtp: dict[str, tuple[int, ...]]


def moe_form(source: TensorSource) -> tuple[Architecture, MoE]:
    """The form of an MoE, in the layout that the source has, and what its config says.

    Raises:
        UnsupportedError: no MoE, of an unknown family, or one whose experts can only be counted.
    """
    form, family = find(source.config), source.config.get("model_type")
    if form is None or not form.is_moe or not form.moe(source.config).sparse_layers:
        known = "has no experts" if form is not None else "is of a family that is not known here"
        raise UnsupportedError(
            f"{source.label} ({family}) {known}", hint="moe-compose ls architectures lists them."
        )
    if form.read_only:
        raise UnsupportedError(f"experts of {family} cannot be selected: {form.read_only}")
    return layout_of(form, source.tensors), form.moe(source.config)


def select_experts(
    source: TensorSource,
    chosen: Mapping[int, Sequence[int]],
    *,
    mtp: MtpPolicy = "prune",
    key: str = "source",
) -> Selected:
    """Tensors and config of a checkpoint with other experts, of its own. Reads no weights.

    Args:
        source: an MoE.
        chosen: sparse layer → its experts, by their ids in the source, in the order of the result;
            as many in every layer. Ids may repeat.
        mtp: of multi-token-prediction layers with experts of their own, when the number changes:
            `prune` takes the ids of the last sparse layer (nothing else is known of them), `keep`
            is refused, `drop` leaves the layers out.
        key: the plan's word for the source.

    Raises:
        UnsupportedError: a selection that the family cannot hold, or tensors that are not
            understood; all faults at once.
    """
    form, moe = moe_form(source)
    problems = list(_wrong_choice(form, moe, source.config, chosen))
    if mtp not in get_args(MtpPolicy):
        problems.append(f"mtp ({mtp}) must be one of {', '.join(get_args(MtpPolicy))}")
    made = None
    if not problems:
        made = _Selection(source, form, moe, chosen, mtp, key)
        problems = made.problems
    if problems or made is None:
        more = len(problems) - _SHOWN
        raise UnsupportedError(
            f"these experts of {source.label} cannot be selected",
            problems=[*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])],
        )
    outputs = sorted(made.outputs, key=lambda o: natural(o.name))
    return Selected(tuple(outputs), made.config, made.dropped, made.mtp)


def _wrong_choice(
    form: Architecture, moe: MoE, config: Mapping[str, Any], chosen: Mapping[int, Sequence[int]]
) -> Iterator[str]:
    """What is wrong with the choice itself."""
    if set(chosen) != set(moe.sparse_layers):
        yield f"layers {sorted(chosen)} are chosen for, {list(moe.sparse_layers)} have experts"
    counts = {len(ids) for ids in chosen.values()}
    if len(counts) != 1:
        yield f"every layer must have as many experts ({sorted(counts)})"
        return
    count = counts.pop()
    if count < moe.top_k:
        yield f"{count} experts are fewer than top_k ({moe.top_k}), which every token is sent to"
        return
    for layer, ids in chosen.items():
        if not all(0 <= e < moe.num_experts for e in ids):
            yield f"layer {layer}: experts must be 0 to {moe.num_experts - 1} ({list(ids)})"
        elif problem := group_problem(moe, ids):
            yield f"layer {layer}: {problem}"
    after = form.moe(with_count(config, form, count))
    if after.num_experts != count:
        yield f"the config cannot state {count} experts"
    elif after.sparse != moe.sparse:
        yield f"with {count} experts this family's config means other layers to be sparse"


def group_problem(moe: MoE, ids: Sequence[int]) -> str | None:
    """Why routing in groups cannot go on with these experts; None if it can."""
    routing = moe.routing
    if not routing.grouped:
        return None
    groups, size = routing.groups, moe.num_experts // routing.groups
    each, rest = divmod(len(ids), groups)
    if rest:
        return f"{len(ids)} experts do not divide into {groups} groups"
    homes = [{e // size for e in ids[g * each : (g + 1) * each]} for g in range(groups)]
    if any(len(home) != 1 for home in homes) or len(set.union(*homes)) != groups:
        return f"experts must stay in their {groups} groups, {each} in each"
    if routing.group_score == "top2" and each < 2:
        return f"a group's worth is the sum of its best 2, and {each} would be left in each"
    if routing.top_groups * each < moe.top_k:
        return (
            f"the best {routing.top_groups} groups of {each} experts hold fewer than "
            f"top_k ({moe.top_k})"
        )
    return None


class _Selection:
    """One selection under way."""

    def __init__(
        self,
        source: TensorSource,
        form: Architecture,
        moe: MoE,
        chosen: Mapping[int, Sequence[int]],
        mtp: MtpPolicy,
        key: str,
    ) -> None:
        self._source, self._form, self._moe, self._key = source, form, moe, key
        self.outputs: list[OutputTensor] = []
        self.dropped: dict[str, str] = {}
        self.problems: list[str] = []
        self.mtp: dict[str, tuple[int, ...]] = {}
        self._seen: dict[tuple[str, str], set[int]] = {}
        self._roles = [Roles(f) for f in (form, *form.layouts)]
        blocks = {self._roles[0].block(i): tuple(ids) for i, ids in chosen.items()}
        last = tuple(chosen[max(chosen)])
        self._unchanged = tuple(range(moe.num_experts))
        changes = len(last) != moe.num_experts
        locate = Locator(form, form.layers.integer(source.config))
        for name, info in source.tensors.items():
            if locate.place(name).kind != "MTP":
                self._take(info, self._roles[0].of(name), blocks)
            elif mtp == "drop":
                self.dropped[f"{key}:{name}"] = "multi-token prediction is left out"
            else:
                found = (roles.of(name) for roles in self._roles)
                role = next((r for r in found if r), None)
                if role is not None:
                    self.mtp.setdefault(role.block, last if changes else self._unchanged)
                self._take(info, role, self.mtp)
        if self.mtp and changes and mtp == "keep":
            self.problems.append(
                f"multi-token-prediction layers ({', '.join(self.mtp)}) have experts, counted by "
                "the same entry of the config: they cannot keep another number (mtp = keep)"
            )
        self._check_experts()
        self.config = with_count(source.config, form, len(last))
        set_names(self.config, self._names(chosen))
        if changes and not source.config.keys().isdisjoint(_NEW_DIALECT):
            both_dialects(self.config, form)
        self.problems += rename_modules(self.config, self._roles[0], {**blocks, **self.mtp})
        if mtp == "drop":
            without_mtp(self.config, form)

    def _take(
        self, info: TensorInfo, role: Role | None, blocks: Mapping[str, Sequence[int]]
    ) -> None:
        """Outputs from one tensor of the source."""
        read, name = Read(self._key, info), info.name
        if role is None:
            if NUMBERED.search(name):
                self.problems.append(f"{name} belongs to an expert that the form does not know")
            self.outputs.append(OutputTensor(name, read))
        elif role.block not in blocks:
            self.problems.append(f"{name} is of a layer that the config gives no experts")
        elif role.kind == "expert":
            self._one_expert(read, role, blocks[role.block])
        else:
            take = self._stacked if role.kind == "stacked" else self._router
            self.outputs.append(OutputTensor(name, take(read, role, blocks[role.block])))

    def _one_expert(self, read: Read, role: Role, ids: Sequence[int]) -> None:
        experts = self._moe.num_experts
        self._seen.setdefault((role.stem, role.rest), set()).add(role.expert)
        if role.expert >= experts:  # rows of no FFN stay behind the experts
            homes = [role.expert - experts + len(ids)]
        else:
            homes = [new for new, old in enumerate(ids) if old == role.expert]
        self.outputs += [OutputTensor(role.renamed(new), read) for new in homes]
        if not homes:
            name = f"{self._key}:{read.tensor.name}"
            self.dropped[name] = f"expert {role.expert} is not selected"

    def _stacked(self, read: Read, role: Role, ids: Sequence[int]) -> Transform:
        assert self._form.experts is not None
        info, experts = read.tensor, self._moe.num_experts
        flat = self._form.experts.flat
        rows = info.shape[0] if info.shape else 0
        if rows == experts or (flat and rows and rows % experts == 0):
            return _rows(read, ids, rows // experts, experts)
        if role.exact or info.numel > 1:
            shape = list(info.shape)
            self.problems.append(f"{info.name} has shape {shape}: no rows for {experts} experts")
        return read

    def _router(self, read: Read, role: Role, ids: Sequence[int]) -> Transform:
        line, info, moe = role.router, read.tensor, self._moe
        assert line is not None
        if line.kind == "other" and role.exact:
            return read
        if line.kind == "table":
            same = tuple(ids) == self._unchanged
            return read if same else Renumber(read, tuple(ids), moe.num_experts)
        rows = moe.num_experts + moe.zero_experts
        if len(info.shape) <= line.dim or info.shape[line.dim] != rows:
            if role.exact or info.numel > 1:
                shape = f"{list(info.shape)}: not {rows} along dimension {line.dim}"
                self.problems.append(f"{info.name} has shape {shape}")
            return read
        wanted = (*ids, *range(moe.num_experts, rows))
        return read if wanted == tuple(range(rows)) else Take(read, Picks(wanted), line.dim)

    def _names(self, chosen: Mapping[int, Sequence[int]]) -> list[str | None]:
        """What the experts are called: as before where every layer has the same in the same place,
        the second of one without a name.
        """
        ids = list(next(iter(chosen.values())))
        if any(list(other) != ids for other in chosen.values()):
            return []
        names = names_of(self._source.config, self._moe.num_experts)
        return [names[e] if e not in ids[:i] else None for i, e in enumerate(ids)]

    def _check_experts(self) -> None:
        """Every expert of a block has the same tensors."""
        for (stem, rest), experts in self._seen.items():
            missing = [e for e in self._unchanged if e not in experts]
            if missing and len(missing) < len(self._unchanged):
                shown = ", ".join(map(str, missing[:5]))
                self.problems.append(f"{stem}*{rest} is missing for experts {shown}")


def _rows(read: Read, ids: Sequence[int], each: int, experts: int) -> Transform:
    """Rows of a stacked tensor, `each` for an expert; runs of neighbours are one piece."""
    if tuple(ids) == tuple(range(experts)):
        return read
    if each == 1:
        return Take(read, Picks(tuple(ids)))
    runs = [
        [e for _, e in run]
        for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])
    ]
    parts = tuple(Take(read, Rows(run[0] * each, (run[-1] + 1) * each)) for run in runs)
    return parts[0] if len(parts) == 1 else Concat(parts)
