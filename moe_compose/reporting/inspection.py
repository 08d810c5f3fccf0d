"""Looking at a checkpoint, or at a plan of one, through its config and headers: no weights are
read and torch is not imported.

A family without a form is shown as far as names, shapes and the usual config keys go.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_compose.architectures import Architecture, find
from moe_compose.architectures.estimates import ServingMemory, serving_memory
from moe_compose.architectures.parts import Parameters, count_parameters
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.reporting.documents import (
    HISTORY_NAME,
    history_of,
    read_validation,
)

#: How active parameters are counted, and after whom.
CONVENTION = (
    "active = total - routed·(E - k)/E, embedding table included "
    "(as Mixtral's 12.9B and Qwen3's A3B are counted)"
)

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "d_model", "n_embd")


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a sparse layer.

    Attributes:
        num_experts, top_k, width: E, k, F.
        shared_width: width of all shared experts together; 0 without any.
        zero_experts: rows of the router that stand for no FFN.
        routing: how experts are chosen and weighted, in words.
    """

    num_experts: int
    top_k: int
    width: int
    shared_width: int
    zero_experts: int
    routing: str


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters of one part of the model, and how many of them one token passes through."""

    total: int
    active: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored in one dtype."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What config, headers and the files around them say about a checkpoint.

    Attributes:
        checkpoint: label.
        revision: commit on the Hub, if it is known.
        model_type: the family, as `config.json` names it.
        hf_class: the transformers class.
        kind: `dense`, `moe`, or `unknown` for a family without a form.
        digest: of config, names, dtypes and shapes.
        layers: how many decoder layers; None where the config does not tell.
        sparse_layers: those that hold experts.
        hidden, vocabulary: sizes; None where the config does not tell.
        experts: None without any, or in an unknown family.
        parameters: by part; None in an unknown family.
        elements: of all tensors, multi-token-prediction layers included.
        dtypes: what is stored in which dtype.
        memory: estimate of what serving takes.
        weight_files: name → bytes; empty where only headers were fetched, or nothing is written.
        files: name → bytes of what travels along.
        history: what moe-compose did to it, oldest first.
        validation: `validation.json`, if there is one.
        notes: what deserves a look.
    """

    checkpoint: str
    revision: str | None
    model_type: str | None
    hf_class: str | None
    kind: Literal["dense", "moe", "unknown"]
    digest: str
    layers: int | None
    sparse_layers: tuple[int, ...]
    hidden: int | None
    vocabulary: int | None
    experts: Experts | None
    parameters: Parameters | None
    elements: int
    dtypes: Mapping[str, Stored]
    memory: ServingMemory
    weight_files: Mapping[str, int]
    files: Mapping[str, int]
    history: tuple[Mapping[str, Any], ...]
    validation: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(stored.bytes for stored in self.dtypes.values())

    @property
    def total(self) -> int:
        """Parameters; in an unknown family, the elements of all tensors."""
        return self.parameters.total if self.parameters else self.elements

    @property
    def cache_full(self) -> int | None:
        """Bytes of the key-value cache of one sequence of full length."""
        per_token = self.memory.cache_per_token
        return per_token * self.memory.context if per_token and self.memory.context else None

    def parts(self) -> dict[str, Part]:
        """Parameters by part, total and active, largest first."""
        return parts_of(self.parameters) if self.parameters else {}

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `inspect --json` prints them."""
        known = self.parameters
        return {
            "checkpoint": self.checkpoint,
            "revision": self.revision,
            "digest": self.digest,
            "family": {"model_type": self.model_type, "class": self.hf_class, "kind": self.kind},
            "layers": {"count": self.layers, "sparse": list(self.sparse_layers)},
            "hidden_size": self.hidden,
            "vocabulary_size": self.vocabulary,
            "experts": asdict(self.experts) if self.experts else None,
            "parameters": {
                "total": self.total,
                "active": known.active if known else None,
                "active_without_embedding": known.active_without_embedding if known else None,
                "mtp": known.mtp if known else None,
                "by_part": {name: asdict(part) for name, part in self.parts().items()},
                "convention": CONVENTION if known else None,
            },
            "dtypes": {name: asdict(stored) for name, stored in self.dtypes.items()},
            "bytes": self.bytes,
            "memory": {**memory_json(self.memory), "cache_full_context": self.cache_full},
            "weight_files": dict(self.weight_files),
            "files": dict(self.files),
            "history": list(self.history),
            "validation": self.validation,
            "notes": list(self.notes),
        }


def memory_json(memory: ServingMemory) -> dict[str, Any]:
    """Bytes to serve, as plain values."""
    return {
        "weights": dict(memory.weights),
        "cache_per_token": memory.cache_per_token,
        "context": memory.context,
    }


def parts_of(parameters: Parameters) -> dict[str, Part]:
    """Parameters by part, total and active, largest first. Only routed experts are ever idle."""
    idle = parameters.total - parameters.active
    sizes = Counter(parameters.by_part).most_common()
    return {n: Part(size, size - idle if n == "experts" else size) for n, size in sizes if size}


def inspect(source: TensorSource) -> Inspection:
    """What a checkpoint is, from its config and headers; reads no weights.

    Args:
        source: a checkpoint, opened with or without its weights, or a plan.

    Returns:
        The inspection. Of a family that is not known, as much as can be told.

    Example:
        >>> inspect(Checkpoint.open("mixtral")).experts.top_k  # doctest: +SKIP
        2
    """
    notes: list[str] = []
    config, form = source.config, find(source.config)
    parameters, experts, sparse = _known(source, form, notes)
    elements = sum(info.numel for info in source.tensors.values())
    text = config.get("text_config")
    basics = {**config, **text} if form is None and isinstance(text, Mapping) else config
    checkpoint = source if isinstance(source, Checkpoint) else None
    return Inspection(
        checkpoint=source.label,
        revision=checkpoint.revision if checkpoint else None,
        model_type=_text(config.get("model_type")),
        hf_class=_class_name(config) or (form.hf_class if form else None),
        kind="unknown" if form is None else "moe" if experts else "dense",
        digest=source.digest(),
        layers=_number(basics, _LAYERS if form is None else (form.layers.name, *_LAYERS)),
        sparse_layers=sparse,
        hidden=_number(basics, _HIDDEN if form is None else (form.hidden.name, *_HIDDEN)),
        vocabulary=_number(basics, ("vocab_size",)),
        experts=experts,
        parameters=parameters,
        elements=elements,
        dtypes=_dtypes(source, notes),
        memory=serving_memory(basics, parameters.total if parameters else elements),
        weight_files={p.name: p.stat().st_size for p in checkpoint.weight_files}
        if checkpoint
        else {},
        files={name: path.stat().st_size for name, path in source.files.items()},
        history=_history(source, notes),
        validation=_validation(checkpoint, notes),
        notes=tuple(notes),
    )


def _known(
    source: TensorSource, form: Architecture | None, notes: list[str]
) -> tuple[Parameters | None, Experts | None, tuple[int, ...]]:
    """What the family's form tells: parameters, experts, and the layers that hold them."""
    if form is None:
        notes.append(
            f"no form for the family {source.config.get('model_type')!r}: experts, routing and "
            "active parameters are not told"
        )
        return None, None, ()
    if form.note:
        notes.append(form.note)
    try:
        parameters = count_parameters(form, source.config, source.tensors)
        if not form.is_moe:
            return parameters, None, ()
        moe = form.moe(source.config)
        if not moe.num_experts or not moe.sparse_layers:
            return parameters, None, ()
    except CheckpointError as error:
        notes.append(str(error))
        return None, None, ()
    experts = Experts(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        width=moe.expert_width,
        shared_width=moe.shared_width,
        zero_experts=moe.zero_experts,
        routing=moe.routing.describe(),
    )
    return parameters, experts, moe.sparse_layers


def _dtypes(source: TensorSource, notes: list[str]) -> dict[str, Stored]:
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for info in source.tensors.values():
        row = found[info.dtype]
        row[0], row[1], row[2] = row[0] + 1, row[1] + info.numel, row[2] + info.nbytes
    if source.config.get("quantization_config") or not found.keys() <= FLOAT_DTYPES.keys():
        notes.append("parameters are stored elements: packed or scaled values count as stored")
    largest = sorted(found.items(), key=lambda item: -item[1][2])
    return {dtype: Stored(*row) for dtype, row in largest}


def _history(source: TensorSource, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    try:
        return tuple(history_of(source))
    except CheckpointError as error:
        notes.append(f"{HISTORY_NAME} is left out: {error.message}")
        return ()


def _validation(checkpoint: Checkpoint | None, notes: list[str]) -> Mapping[str, Any] | None:
    try:
        return read_validation(checkpoint) if checkpoint else None
    except CheckpointError as error:
        notes.append(f"validation is left out: {error.message}")
        return None


def _class_name(config: Mapping[str, Any]) -> str | None:
    found = config.get("architectures")
    return _text(found[0]) if isinstance(found, list) and found else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
