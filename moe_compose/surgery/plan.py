"""`Plan`: a checkpoint that has not been written yet.

A plan says, for every tensor of the result, which source tensors it is made from and by which
transforms. Building one reads no weights. It can be checked, summed up, hashed, written, or used as
the source of the next operation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from moe_compose.architectures import find
from moe_compose.architectures.estimates import ServingMemory, serving_memory
from moe_compose.architectures.parts import Parameters, count_parameters, layout_of
from moe_compose.checkpoint.source import Extent, TensorInfo, TensorSource
from moe_compose.errors import PlanError
from moe_compose.surgery import evaluate
from moe_compose.surgery.arithmetic import constant_value
from moe_compose.surgery.history import constants_beside, is_constant, name_pattern
from moe_compose.surgery.selected_config import packed_stems
from moe_compose.surgery.transforms import Read, Transform
from moe_compose.version import __version__

if TYPE_CHECKING:
    import torch

#: Notes that training makes untrue begin so.
UNTRAINED = "not trained after surgery"
UNTRAINED_ROUTER = "the router is not trained"

#: Part of every digest; raised when a transform of the same name comes to give other bytes.
ARITHMETIC = 1


def _said_of(source: TensorSource) -> dict[str, Any]:
    family = source.config.get("model_type")
    return {"label": source.label, "digest": source.digest(), "model_type": family}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the result: what it is called, and what makes it."""

    name: str
    value: Transform

    @property
    def info(self) -> TensorInfo:
        spec = self.value.spec
        return TensorInfo(self.name, spec.dtype, spec.shape, spec.nbytes)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a plan rounds the weights it starts from: once, to nearest.

    Attributes:
        dtype: to what (`bfloat16`).
        everything: all weights; otherwise the FFNs only.
        up, down: what the FFNs' matrices are multiplied by first (√G). Rounding `f·W` is not
            rounding `W` when f is no power of two.
    """

    dtype: str
    everything: bool = False
    up: float = 1.0
    down: float = 1.0


@dataclass(frozen=True, slots=True)
class Preservation:
    """How far the result computes what its source computes, stated before anything is written.

    Attributes:
        kind: `exact` (same function), `approximate` (a known factor, or small noise), `none`
            (changed on purpose).
        why: the reason, one sentence.
        tolerance: `exact`: the largest relative error of fp32 logits that counts as such;
            `approximate`: the largest mean KL to the source, in nats.
        rounding: `exact` means the source with its weights so rounded; None where none is.
        reference: the plan's word for the source that this is said of, and behind a slash that
            one's word for its own, where it is a plan too; empty: the first one.
    """

    kind: Literal["exact", "approximate", "none"]
    why: str
    tolerance: float = 1e-6
    rounding: Rounding | None = None
    reference: str = ""

    def __str__(self) -> str:
        rounded = f", up to rounding weights to {self.rounding.dtype}" if self.rounding else ""
        return f"{self.kind}: {self.why}{rounded}"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Preservation:
        """The class that a record states.

        Raises:
            TypeError: entries that this version does not know.
        """
        rounding = found.get("rounding")
        return cls(**{**found, "rounding": Rounding(**rounding) if rounding else None})


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a dry run shows.

    Attributes:
        parameters: of the result, by part, total and active.
        bytes: of its tensors on disk.
        copied_bytes: of those, how many are moved without being decoded.
        memory: estimate of what serving it takes.
        tensors: how many.
    """

    parameters: Parameters
    bytes: int
    copied_bytes: int
    memory: ServingMemory
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be written, from what, by which transforms. A `TensorSource`.

    Attributes:
        operation: the verb (`upcycle`).
        options: the operation's options as plain values, for the card and the digest.
        config: the result's `config.json`.
        outputs: every tensor of the result, in order.
        sources: the checkpoints read from, by the names that transforms use.
        files: what is carried along, file by file.
        dropped: `source:tensor` → why it is not used.
        preservation: how far the function is kept.
        notes: what a user should know before writing.
        card: the source's model card, if it has one.
        decided: what the operation chose by itself (which experts are kept), for the record.
        reports: JSON documents that are written beside the result, by file name.
    """

    operation: str
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    outputs: tuple[OutputTensor, ...]
    sources: Mapping[str, TensorSource]
    preservation: Preservation
    files: Mapping[str, Path] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    card: Path | None = None
    decided: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return MappingProxyType({o.name: o.info for o in self.outputs})

    @cached_property
    def _by_name(self) -> Mapping[str, OutputTensor]:
        return {o.name: o for o in self.outputs}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return tuple(f for s in self.sources.values() for f in s.weight_files)

    @property
    def label(self) -> str:
        return f"{self.operation} of {', '.join(s.label for s in self.sources.values())}"

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return evaluate.extents(self._by_name[name].value, self.sources)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        return evaluate.stream(self._by_name[name].value, self.sources)

    def read(self, name: str) -> torch.Tensor:
        return evaluate.value(self._by_name[name].value, self.sources)

    def digest(self) -> str:
        """Hex SHA-256 of config, outputs with their transforms, and the digests of the sources.

        Equal plans have equal digests, on every machine. Weights are not part of it: building a
        plan reads none.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        h = hashlib.sha256(f"arithmetic {ARITHMETIC}".encode())
        h.update(json.dumps(self.config, sort_keys=True).encode())
        for name, source in sorted(self.sources.items()):
            h.update(f"\0{name}\0{source.digest()}".encode())
        for o in self.outputs:
            h.update(f"\0{o.name}\0{o.value!r}".encode())
        return h.hexdigest()

    @property
    def reference(self) -> TensorSource:
        """The source that the preservation class is stated of."""
        found: TensorSource = self
        for key in (self.preservation.reference or next(iter(self.sources))).split("/"):
            assert isinstance(found, Plan)
            found = found.sources[key]
        return found

    def constants(self) -> tuple[str, ...]:
        """Outputs that are one number throughout on purpose, made so here or by what made the
        sources: patterns (`*` for every number) where all of them are, single names where some are.
        """
        by_pattern: dict[str, list[str]] = {}
        for name in self._by_name:
            by_pattern.setdefault(name_pattern(name), []).append(name)
        found: list[str] = []
        for pattern, names in by_pattern.items():
            constant = [n for n in names if self._constant(n) is not None]
            found += [pattern] if len(constant) == len(names) else constant
        return tuple(sorted(found))

    def _constant(self, name: str) -> Hashable | None:
        """What an output is throughout."""
        return constant_value(self._by_name[name].value, self._constant_source)

    def _constant_source(self, read: Read) -> Hashable | None:
        source, name = self.sources[read.source], read.tensor.name
        if isinstance(source, Plan):
            return source._constant(name)
        known = is_constant(name, self._constants_beside[read.source])
        return (read.source, name_pattern(name)) if known else None

    @cached_property
    def _constants_beside(self) -> Mapping[str, frozenset[str]]:
        return {k: constants_beside(s) for k, s in self.sources.items() if not isinstance(s, Plan)}

    def copied(self) -> tuple[str, ...]:
        """Patterns of outputs that all are, byte for byte, the tensor of their name of the source
        that the plan is stated of.
        """
        changed = {name_pattern(n) for n in self._by_name if not self._is_copy(n)}
        return tuple(sorted({name_pattern(n) for n in self._by_name} - changed))

    def _is_copy(self, name: str) -> bool:
        """Whether an output is the source's tensor of its name, also through plans of plans."""
        value = self._by_name[name].value
        stated = self.preservation.reference.partition("/")[0] or next(iter(self.sources))
        if not isinstance(value, Read) or (value.source, value.tensor.name) != (stated, name):
            return False
        source = self.sources[stated]
        return not isinstance(source, Plan) or source._is_copy(name)

    def record(self) -> dict[str, Any]:
        """This operation as an entry of a checkpoint's surgery history: plain values."""
        parameters = self.summary().parameters
        return {
            "operation": self.operation,
            "options": dict(self.options),
            "plan_digest": self.digest(),
            "sources": [_said_of(s) for s in self.sources.values()],
            "preservation": asdict(self.preservation),
            "parameters": {"total": parameters.total, "active": parameters.active},
            "constants": list(self.constants()),
            "copied": list(self.copied()),
            "version": __version__,
        } | ({"decided": dict(self.decided)} if self.decided else {})

    def check(self) -> Plan:
        """Hold the plan to the laws of a plan; returns it.

        Raises:
            PlanError: an output named twice or missing, a source tensor neither used nor dropped on
                purpose, a declared shape or dtype that the transforms do not give. All of them at
                once.
        """
        problems = [*self._unaccounted(), *self._wrong_experts()]
        if len(self._by_name) != len(self.outputs):
            problems.append("two outputs have the same name")
        for o in self.outputs:
            try:
                evaluate.check_on_meta(o.value)
            except PlanError as e:
                problems.append(f"{o.name}: {e}")
        if problems:
            shown = problems[:20]
            more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise PlanError("the plan breaks its own laws", problems=[*shown, *more])
        return self

    def _unaccounted(self) -> Iterator[str]:
        used = {(r.source, r.tensor.name) for o in self.outputs for r in o.value.leaves()}
        for key, source in self.sources.items():
            for name in source.tensors:
                if (key, name) not in used and f"{key}:{name}" not in self.dropped:
                    yield f"source tensor {name} ({source.label}) has no home in the target"

    def _wrong_experts(self) -> Iterator[str]:
        form = find(self.config)
        if form is None or not form.is_moe:
            return
        form = layout_of(form, self.tensors)
        stems = packed_stems(self.tensors)
        for layer in form.moe(self.config).sparse_layers:
            for name, shape in form.moe_shapes(self.config, layer).items():
                if name.removesuffix(".weight") in stems:
                    continue
                if name not in self.tensors:
                    yield f"{name} is missing"
                elif self.tensors[name].shape != shape:
                    yield f"{name} has shape {list(self.tensors[name].shape)}, not {list(shape)}"

    def summary(self) -> PlanSummary:
        """Parameters, bytes and memory of the result; reads no weights."""
        form = find(self.config)
        if form is None:
            raise PlanError(f"no form for model_type {self.config.get('model_type')!r}")
        parameters = count_parameters(form, self.config, self.tensors)
        infos = self.tensors.values()
        return PlanSummary(
            parameters=parameters,
            bytes=sum(t.nbytes for t in infos),
            copied_bytes=sum(t.nbytes for t in infos if self.extents(t.name) is not None),
            memory=serving_memory(self.config, parameters.total),
            tensors=len(self.tensors),
        )
