"""What changed between two checkpoints: `Difference` and its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: `same`: equal bytes in the same place. `moved`: equal bytes under another index. `copied`: equal
#: bytes once more, beside an expert that is the same or moved.
Status = Literal["same", "moved", "copied", "changed", "added", "removed"]
STATUSES: tuple[Status, ...] = ("same", "moved", "copied", "changed", "added", "removed")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        label: folder's name, Hub id, or what the plan says of itself.
        digest: of config, names, dtypes and shapes.
        model_type: the family.
        experts, top_k: a layer and a token; None without any.
        sparse_layers: how many layers have experts.
        total, active: parameters; `active` is None in an unknown family.
        tensors: how many.
        bytes: of all tensors.
    """

    label: str
    digest: str
    model_type: str | None
    experts: int | None
    top_k: int | None
    sparse_layers: int
    total: int
    active: int | None
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class EntryChange:
    """An entry of `config.json`; a dot descends into an object. None where it is not there."""

    name: str
    status: Status
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class ExpertChange:
    """What became of an expert.

    Attributes:
        expert: its index in the second checkpoint; None if it was removed.
        was: its index in the first; None if it was added.
        status: of its tensors, all together.
        distance: ‖after − before‖ / ‖before‖ over all its tensors, where it changed; None where
            shapes differ or values are no floats.
        row: whether its rows of the router are the same bytes; None if it was added or removed, or
            the router has no rows.
        row_distance: as `distance`, of its rows, where these changed.
    """

    expert: int | None
    was: int | None
    status: Status
    distance: float | None = None
    row: bool | None = None
    row_distance: float | None = None


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The experts of one layer.

    Attributes:
        block: what its tensors' names begin with, such as `model.layers.3`.
        experts: in the order of the second checkpoint, then the removed ones.
    """

    block: str
    experts: tuple[ExpertChange, ...]

    @property
    def counts(self) -> Counter[Status]:
        """How many experts have which status."""
        return Counter(e.status for e in self.experts)

    @property
    def rows(self) -> tuple[int, int]:
        """Experts that are in both with equal rows of the router, and all that are in both."""
        both = [e.row for e in self.experts if e.row is not None]
        return sum(both), len(both)

    def worst(self) -> float | None:
        """The largest distance of an expert; None where none is known."""
        return max((e.distance for e in self.experts if e.distance is not None), default=None)

    def worst_row(self) -> float | None:
        """The largest distance of an expert's rows of the router; None where none is known."""
        known = (e.row_distance for e in self.experts if e.row_distance is not None)
        return max(known, default=None)


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor that belongs to no expert; `before` and `after` are dtype and shape (`F32 [4, 8]`),
    None where it is not there, `distance` as in `ExpertChange`.
    """

    name: str
    status: Status
    before: str | None
    after: str | None
    distance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What changed from one checkpoint to another.

    Attributes:
        before, after: the two.
        config: entries that are not the same.
        layers: every layer that has experts in one of them.
        tensors: those outside the experts that are not the same.
        same_tensors: how many of those are.
        files: name → status, of the files that are not the same.
        same_files: how many are. Model card and surgery history are left out: they tell how a
            checkpoint was made, not what it is.
        notes: what could not be compared.
    """

    before: Side
    after: Side
    config: tuple[EntryChange, ...]
    layers: tuple[LayerChange, ...]
    tensors: tuple[TensorChange, ...]
    same_tensors: int
    files: Mapping[str, Status]
    same_files: int
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        others = self.config or self.tensors or self.files
        return not others and self.same_experts and self.same_rows

    @property
    def same_experts(self) -> bool:
        """Whether all experts are where and what they were."""
        return self.experts.keys() <= {"same"}

    @property
    def same_rows(self) -> bool:
        """Whether every expert that is in both has the rows of the router that it had."""
        return all(e.row is not False for layer in self.layers for e in layer.experts)

    @property
    def experts(self) -> Counter[Status]:
        """Status → experts of all layers."""
        return sum((layer.counts for layer in self.layers), Counter())

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `diff --json` prints them."""
        return {
            "same": self.same,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "config": [asdict(c) for c in self.config],
            "experts": {s: self.experts[s] for s in STATUSES},
            "layers": [asdict(layer) for layer in self.layers],
            "tensors": {"same": self.same_tensors, "others": [asdict(t) for t in self.tensors]},
            "files": {"same": self.same_files, "others": dict(self.files)},
            "notes": list(self.notes),
        }
