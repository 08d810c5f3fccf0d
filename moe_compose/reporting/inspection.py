"""What is known about a checkpoint: `Inspection` and its parts, as people and scripts get them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_compose.architectures.estimates import ServingMemory
from moe_compose.architectures.parts import Parameters

#: How active parameters are counted, and after whom.
CONVENTION = (
    "active = total - routed·(E - k)/E, embedding table included "
    "(as Mixtral's 12.9B and Qwen3's A3B are counted)"
)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a sparse layer.

    Attributes:
        num_experts, top_k, width: E, k, F.
        shared_width: width of all shared experts together; 0 without any.
        zero_experts: rows of the router that stand for no FFN.
        routing: how experts are chosen and weighted, in words.
        names: of each expert; None for one without, empty where none has a name.
    """

    num_experts: int
    top_k: int
    width: int
    shared_width: int
    zero_experts: int
    routing: str
    names: tuple[str | None, ...] = ()


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
