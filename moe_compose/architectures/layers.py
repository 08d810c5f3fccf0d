"""Which decoder layers are sparse: the closed set of rules that families use, each readable and
writable.

Every rule answers `sparse(config, n)`: one bool per layer, and `edit(config, sparse)`: write that
choice into a config, or say that the family cannot hold it (None is returned by `refusal` when it
can).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_compose.architectures.base import Key


class LayerRule(Protocol):
    """Where a family's config says which layers hold experts."""

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        """One bool per decoder layer: does it hold experts?"""

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        """Why the family cannot hold this choice of layers; None when it can."""

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        """Write the choice into `config`; only after `refusal` has returned None."""


@dataclass(frozen=True)
class EveryLayer:
    """All layers are sparse, and the family has no way to say otherwise."""

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        return (True,) * layers

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return None if all(sparse) else "every layer of this family is sparse"

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class FirstDense:
    """The first `key` layers are dense (DeepSeek, GLM: `first_k_dense_replace`).

    `types`, where given, is a per-layer list that newer configs carry as well and that wins when
    present; `frequency` an entry that makes only every n-th layer sparse.
    """

    key: Key
    types: Key | None = None
    frequency: Key | None = None
    moe: str = "sparse"
    dense: str = "dense"

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        listed = self.types.get(config) if self.types is not None else None
        if listed is not None:
            return tuple(t != self.dense for t in listed[:layers])
        first = self.key.integer(config)
        every = self.frequency.integer(config) if self.frequency is not None else 1
        return tuple(i >= first and i % every == 0 for i in range(layers))

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        first = list(sparse).index(True) if any(sparse) else len(sparse)
        return None if all(sparse[first:]) else "only the first layers may be dense in this family"

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        first = list(sparse).index(True) if any(sparse) else len(sparse)
        self.key.edit(config, first)
        if self.types is not None and self.types.get(config) is not None:
            self.types.edit(config, [self.moe if s else self.dense for s in sparse])
        if self.frequency is not None:
            self.frequency.edit(config, 1)


@dataclass(frozen=True, kw_only=True)
class StepAndList:
    """Qwen: layer i is sparse when `(i + 1) % decoder_sparse_step == 0` and i is not in
    `mlp_only_layers`.
    """

    step: Key = Key(name="decoder_sparse_step", default=1)
    dense: Key = Key(name="mlp_only_layers", default=())

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        step, dense = self.step.integer(config), set(self.dense.get(config))
        return tuple(step > 0 and (i + 1) % step == 0 and i not in dense for i in range(layers))

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return None

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        self.step.edit(config, 1)
        self.dense.edit(config, [i for i, s in enumerate(sparse) if not s])


@dataclass(frozen=True, kw_only=True)
class TypeList:
    """A list of one word per layer (`mlp_layer_types`); absent, `first_dense` layers are dense (or
    all are sparse).
    """

    key: Key
    moe: tuple[str, ...] = ("sparse",)
    dense: str = "dense"
    first_dense: int = 0

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        listed = self.key.get(config)
        if listed is None:
            return tuple(i >= self.first_dense for i in range(layers))
        return tuple(t in self.moe for t in listed[:layers])

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return None

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        self.key.edit(config, [self.moe[0] if s else self.dense for s in sparse])


@dataclass(frozen=True, kw_only=True)
class Interval:
    """ERNIE: sparse from `start` to `end` (−1: the last), every `step`-th layer: `(i + 1) % step ==
    0`.
    """

    start: Key
    end: Key
    step: Key

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        start, step = self.start.integer(config), self.step.integer(config)
        end = self.end.get(config)
        last = layers - 1 if end == -1 else end
        return tuple(start <= i <= last and (i + 1) % step == 0 for i in range(layers))

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        chosen = [i for i, s in enumerate(sparse) if s]
        if chosen and chosen != list(range(chosen[0], chosen[-1] + 1)):
            return "the sparse layers of this family are one run of consecutive layers"
        return None

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        chosen = [i for i, s in enumerate(sparse) if s]
        self.start.edit(config, chosen[0])
        self.end.edit(config, chosen[-1])
        self.step.edit(config, 1)


@dataclass(frozen=True, kw_only=True)
class Period:
    """Jamba: layer i is sparse when `i % period == offset`; with one expert, none is."""

    period: Key
    offset: Key
    experts: Key

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        period, offset = self.period.integer(config), self.offset.integer(config)
        several = self.experts.integer(config) > 1
        return tuple(several and i % period == offset for i in range(layers))

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return "sparse layers of this family come at a fixed period"

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        raise AssertionError("refusal() always refuses")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Nemotron-H: a layer is one block (attention, Mamba, FFN or experts); a list of words, or a
    string of letters, says which.
    """

    key: Key
    moe: tuple[str, ...]

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        return tuple(block in self.moe for block in self.key.get(config))

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return "a layer of experts has no attention of its own in this family"

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        raise AssertionError("refusal() always refuses")


@dataclass(frozen=True, kw_only=True)
class StepOrList:
    """Llama 4: the layers listed in `layers_key`; else every `step`-th: `(i + 1) % step == 0`."""

    layers_key: Key
    step: Key

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        listed = self.layers_key.get(config)
        step = self.step.integer(config)
        chosen = set(listed) if listed is not None else set(range(step - 1, layers, step))
        return tuple(i in chosen for i in range(layers))

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return None

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        self.layers_key.edit(config, [i for i, s in enumerate(sparse) if s])


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One entry turns experts on for all layers (`enable_moe_block`, or an expert count of 0 for a
    dense model).
    """

    key: Key

    def sparse(self, config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
        return (bool(self.key.get(config)),) * layers

    def refusal(self, sparse: Sequence[bool]) -> str | None:
        return None if all(sparse) else "every layer of this family is sparse, or none"

    def edit(self, config: dict[str, Any], sparse: Sequence[bool]) -> None:
        if isinstance(self.key.get(config), bool):
            self.key.edit(config, True)
