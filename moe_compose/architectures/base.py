"""The form that every model family fills in.

A family is *data*: where its tensors lie on disk, what its config keys are called, how it routes,
which layers are sparse, and which dense families have the same mathematics around the FFN.
Operations ask the form; none of them knows a family by name. A family that needs something new gets
a new field here.

Templates: `{i}` is the decoder layer, `{e}` the expert. Shapes: E experts, F expert width, D model
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_compose.errors import CheckpointError

#: A key without a default: the config must state it.
REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of `config.json`.

    Attributes:
        name: the published name; a dot descends into a nested object (`ffn_config.moe_top_k`).
        aliases: other names the family has had. Read when `name` is absent; all of them are
            written.
        default: what the family's config class takes when the entry is absent.
        values: translates the stored value to the form's word for it.
        count_of: the entry is a list of words, one per layer, and how often this one occurs is
            meant; with `""`, how long the list is. A number is taken as it is.
        most: no number beyond this is believed; it would only fill the memory.
    """

    name: str
    aliases: tuple[str, ...] = ()
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    count_of: str | None = None
    most: int = 1 << 30

    def get(self, config: Mapping[str, Any]) -> Any:
        """The entry's value in `config`.

        Raises:
            CheckpointError: absent and without a default, or a value the form has no word for.
        """
        for name in (self.name, *self.aliases):
            node: Any = config
            for step in name.split("."):
                node = node.get(step) if isinstance(node, Mapping) else None
            if node is not None:
                break
        else:
            node = self.default
        if node is REQUIRED:
            raise CheckpointError(f"config.json has no {self.name!r}, which its family requires")
        if self.count_of is not None and isinstance(node, Sequence):
            node = sum(word == self.count_of for word in node) if self.count_of else len(node)
        if self.values is None:
            return node
        if node not in self.values:
            known = ", ".join(map(repr, self.values))
            raise CheckpointError(f"config.json: {self.name} ({node!r}) is none of {known}")
        return self.values[node]

    def integer(self, config: Mapping[str, Any]) -> int:
        """The entry as a non-negative int.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.get(config)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.most:
            raise CheckpointError(
                f"config.json: {self.name} must be a whole number up to {self.most} ({value!r})"
            )
        return value

    def edit(self, config: dict[str, Any], value: Any) -> None:
        """Set the entry under every name it has had."""
        for name in (self.name, *self.aliases):
            *path, last = name.split(".")
            node = config
            for step in path:
                node = node.setdefault(step, {})
            node[last] = value


@dataclass(frozen=True, kw_only=True)
class Computed(Key):
    """A number or list that follows from several entries (`head_dim ** -0.5`); stands wherever a
    `Key` does, to be read.

    Attributes:
        name: the formula in words, or the entry that usually holds it.
        formula: what the config class, or the modelling code, computes.
    """

    formula: Callable[[Mapping[str, Any]], Any]

    def get(self, config: Mapping[str, Any]) -> Any:
        return self.formula(config)


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """A feed-forward network on disk: its matrices' names and how they lie.

    Per expert (names with `{e}`) and dense: `gate, up: [F, D]`, `down: [D, F]`, `gate_up: [2F, D]`.
    Stacked (no `{e}` in an expert's name): a leading `E`. `transposed`: the last two dimensions
    swapped.
    `flat`: stacked along rows instead, `[E·F, D]` for all three (DBRX).

    Attributes:
        gate, up, down, gate_up: name templates; a fused `gate_up` replaces the first two; without
            both, the FFN is not gated.
        transposed: `[in, out]` instead of `[out, in]`.
        interleaved: gate and up alternate along the fused dimension instead of following one
            another.
        flat: see above.
        biases: name templates of bias vectors, one for each of `names`: `[out]`, or `[E, out]`
            when stacked.
    """

    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    biases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The weight templates that exist, gate before up before down."""
        return tuple(n for n in (self.gate, self.up, self.gate_up, self.down) if n)

    @property
    def stacked(self) -> bool:
        """Whether all experts share one tensor. Meaningless for a dense FFN."""
        return "{e}" not in self.down

    def shapes(
        self, width: int, hidden: int, experts: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Template → shape of each weight and bias; `experts` where they are stacked, None
        otherwise.
        """
        rows = {
            self.gate: (width, hidden),
            self.up: (width, hidden),
            self.gate_up: (2 * width, hidden),
        }
        rows[self.down] = (hidden, width)
        if self.flat:
            return dict.fromkeys(self.names, ((experts or 1) * width, hidden))
        lead = () if experts is None else (experts,)
        shapes = {n: lead + (rows[n][::-1] if self.transposed else rows[n]) for n in self.names}
        outs = [rows[n][:1] for n in self.names]
        return shapes | {b: lead + out for b, out in zip(self.biases, outs, strict=False)}


@dataclass(frozen=True, kw_only=True)
class RouterTensor:
    """A tensor with one row (or entry) per expert.

    Attributes:
        name: template.
        kind: what it does; `weight` is `[E, D]`, the others `[E]`. `other` is router machinery
            without an expert dimension; `table` maps token ids to expert ids (DeepSeek-V4) and must
            be rewritten when experts move.
        dim: which dimension counts experts.
        lead: leading dimensions of size 1 (`[1, E]` in ERNIE: lead=1, dim=1).
        dtype: stored so whatever the checkpoint's dtype (correction biases are fp32).
        optional: may be absent from a checkpoint of the family, or from some of its layers.
        when: config entry without which the tensor does not exist.
        width: config key of the columns of `weight` where they are not D (ZAYA).
    """

    name: str
    kind: Literal["weight", "bias", "correction_bias", "scale", "table", "other"] = "weight"
    dim: int = 0
    lead: int = 0
    dtype: str | None = None
    optional: bool = False
    when: Key | None = None
    width: Key | None = None

    def shape(self, experts: int, hidden: int) -> tuple[int, ...]:
        """`[E, D]` for the weight, `[E]` for the vectors, after `lead` ones."""
        return (1,) * self.lead + ((experts, hidden) if self.kind == "weight" else (experts,))


@dataclass(frozen=True, kw_only=True)
class SharedExperts:
    """Experts that every token passes through, beside the routed ones.

    Attributes:
        matrices: where they lie.
        width: config key of the width of one.
        count: config key of how many; they are stored as one of width `count × width`.
        gate: template of the `[1, D]` row whose sigmoid scales their output (Qwen2-MoE); empty
            where they are simply added.
        average: the sum with the routed output is halved (Cohere).
        optional: a total width of 0 is a proper member of the family, in every engine.
    """

    matrices: Matrices
    width: Key
    count: Key | None = None
    gate: str = ""
    average: bool | Key = False
    optional: bool = False

    def total_width(self, config: Mapping[str, Any]) -> int:
        """Width of all shared experts together; 0 when there is none."""
        count = 1 if self.count is None else self.count.integer(config)
        return count * self.width.integer(config)
