"""`Architecture`: the facts of one family in one record.

A dense family is an `Architecture` without experts. Its `facts` are what its config class assumes
where `config.json` is silent; they are written out when a checkpoint changes family, since the new
family's class assumes something else (a defaulted `rope_theta` costs 0.25 nats and no error is
raised).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_compose.architectures.base import Key, Matrices, RouterTensor, SharedExperts
from moe_compose.architectures.layers import EveryLayer, LayerRule
from moe_compose.architectures.routing_form import Routing, RoutingForm
from moe_compose.architectures.twin import Twin
from moe_compose.errors import CheckpointError

#: Counts of experts that engines have kernels for: powers of two up to 512, and a few more.
USUAL_COUNTS = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 192, 320, 384, 448, 576})

_MTP_COUNT = (
    Key(name="num_nextn_predict_layers"),
    Key(name="mtp_num_hidden_layers"),
    Key(name="mtp_num_layers"),
    Key(name="num_mtp_layers"),
)


@dataclass(frozen=True, kw_only=True)
class Portable:
    """A config entry that engines other than transformers read differently, or not at all.

    Attributes:
        key: the entry.
        allowed: values that mean the same everywhere.
        breaks: which engines any other value breaks, and whether silently.
    """

    key: Key
    allowed: tuple[Any, ...]
    breaks: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The facts of one model family.

    Attributes:
        model_type: as in `config.json`.
        hf_class: the transformers class, as in `architectures`.
        mlp: the dense FFN; None for a family without dense layers.
        width: config key of the dense FFN's width.
        experts: the routed experts; None for a dense family.
        num_experts, top_k, expert_width: config keys.
        router: tensors with one row per expert, and further router machinery.
        shared: always-on experts.
        routing: how logits become experts and weights.
        sparse: which layers hold experts.
        mtp: prefixes of multi-token-prediction tensors (`{n}` = `num_hidden_layers`), which hold
            routers of their own.
        mtp_count: config keys that say how many such layers there are; those present become 0 when
            the layers are left out, and the first one if none is.
        embedding, head: names of the token embedding and the output projection.
        facts: what the config class assumes where `config.json` is silent, for entries that change
            what the model computes.
        spelled: entries that say in a published config what this family always does, and that other
            engines go by though its own class does not; written into results, not asked of sources.
        per_layer_rope: rope parameters are kept per layer type; there is only one dialect of them.
        twins: dense families that this one can be grown from.
        without_experts: the form of a checkpoint of this family whose config turns experts off in
            every layer, and which then is a dense model (Granite 4, Gemma 4).
        zero_experts: rows of the router, after the experts' own, that stand for no FFN at all
            (LongCat, ZAYA).
        expert_hidden: config key of the experts' input width where it may not be D (Nemotron's
            latent); null or absent: D.
        parallel_mlp: the dense FFN stands beside the experts, in sparse layers too (Gemma 4,
            LongCat).
        parts: template → part of the model, for tensors that no other field names and whose name
            does not tell.
        layouts: the same family under other names on disk; `parts.layout_of` tells which one a
            checkpoint has.
        read_only: why experts of this family can be counted and no more; empty where they can be
            operated on.
        portable: entries that other engines read differently.
        sparse_only: which engines a dense layer breaks; empty where dense layers work everywhere.
        usual_counts: which engines refuse counts of experts that are not in `USUAL_COUNTS`; empty
            where others are only slower.
        note: anything a reader should know.
    """

    model_type: str
    hf_class: str
    mlp: Matrices | None = None
    width: Key = Key(name="intermediate_size")
    experts: Matrices | None = None
    num_experts: Key = Key(name="num_experts")
    top_k: Key = Key(name="num_experts_per_tok")
    expert_width: Key = Key(name="moe_intermediate_size")
    router: tuple[RouterTensor, ...] = ()
    shared: SharedExperts | None = None
    routing: RoutingForm | None = None
    sparse: LayerRule = EveryLayer()
    mtp: tuple[str, ...] = ()
    mtp_count: tuple[Key, ...] = _MTP_COUNT
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    hidden: Key = Key(name="hidden_size")
    layers: Key = Key(name="num_hidden_layers", most=10_000)
    facts: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, Any] = field(default_factory=dict)
    per_layer_rope: bool = False
    twins: tuple[Twin, ...] = ()
    without_experts: Architecture | None = None
    zero_experts: int | Key = 0
    expert_hidden: Key | None = None
    parallel_mlp: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)
    layouts: tuple[Architecture, ...] = ()
    read_only: str = ""
    portable: tuple[Portable, ...] = ()
    sparse_only: str = ""
    usual_counts: str = ""
    note: str = ""

    @property
    def is_moe(self) -> bool:
        return self.experts is not None

    def moe(self, config: Mapping[str, Any]) -> MoE:
        """The MoE side of `config`, read through this form.

        Raises:
            CheckpointError: an entry the family requires is missing or malformed.
        """
        if self.experts is None or self.routing is None:
            raise CheckpointError(f"{self.model_type} is a dense family: it has no experts")
        layers, hidden = self.layers.integer(config), self.hidden.integer(config)
        zero, latent = self.zero_experts, self.expert_hidden
        return MoE(
            num_experts=_whole(self.num_experts, config),
            top_k=_whole(self.top_k, config),
            expert_width=_whole(self.expert_width, config),
            shared_width=self.shared.total_width(config) if self.shared else 0,
            hidden=hidden,
            routing=self.routing.resolve(config),
            sparse=self.sparse.sparse(config, layers),
            zero_experts=zero.integer(config) if isinstance(zero, Key) else zero,
            expert_hidden=(latent.get(config) or hidden) if latent else hidden,
        )

    def renamed(self, names: Mapping[str, str]) -> Architecture:
        """The same family with other beginnings of the tensors' names, as one of its `layouts`."""
        fields = ("mlp", "experts", "router", "shared", "mtp", "embedding", "head", "parts")
        return replace(self, **{f: _renamed(getattr(self, f), names) for f in fields})

    def of(self, config: Mapping[str, Any]) -> Architecture:
        """This form, or `without_experts` where `config` turns them off."""
        dense = self.without_experts
        if dense is None or any(self.sparse.sparse(config, self.layers.integer(config))):
            return self
        return dense

    def twin_of(self, dense: str) -> Twin | None:
        """The pair with a dense family, if there is an exact one."""
        return next((t for t in self.twins if t.dense == dense), None)

    def moe_shapes(self, config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of every router, expert and shared-expert tensor of a sparse layer; optional
        ones left out.
        """
        assert self.experts is not None
        moe = self.moe(config)
        rows = moe.num_experts + moe.zero_experts
        shapes = {
            t.name.format(i=layer): t.shape(
                rows, t.width.integer(config) if t.width else moe.hidden
            )
            for t in self.router
            if t.kind != "other" and not t.optional and (t.when is None or t.when.get(config))
        }
        if self.experts.stacked:
            stacked = self.experts.shapes(moe.expert_width, moe.expert_hidden, moe.num_experts)
            shapes |= {n.format(i=layer): s for n, s in stacked.items()}
        else:
            one = self.experts.shapes(moe.expert_width, moe.expert_hidden)
            shapes |= {
                n.format(i=layer, e=e): s for e in range(moe.num_experts) for n, s in one.items()
            }
        if self.shared and moe.shared_width:
            shared = self.shared.matrices.shapes(moe.shared_width, moe.hidden)
            shapes |= {n.format(i=layer): s for n, s in shared.items()}
            if self.shared.gate:
                shapes[self.shared.gate.format(i=layer)] = (1, moe.hidden)
        return shapes


@dataclass(frozen=True, kw_only=True)
class MoE:
    """What a config says about its experts. `sparse` has one bool per decoder layer; widths and
    counts as in METHODS: E, k, F. `zero_experts` rows of the router follow those of the experts; an
    expert's input and output are `expert_hidden` wide.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    hidden: int
    routing: Routing
    sparse: tuple[bool, ...]
    zero_experts: int
    expert_hidden: int

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i, s in enumerate(self.sparse) if s)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        new = ((n + value.removeprefix(old)) for old, n in names.items() if value.startswith(old))
        return next(new, value)
    if isinstance(value, tuple):
        return tuple(_renamed(v, names) for v in value)
    if isinstance(value, Mapping):
        return {_renamed(k, names): v for k, v in value.items()}
    if isinstance(value, Matrices | RouterTensor | SharedExperts):
        return replace(value, **{k: _renamed(v, names) for k, v in vars(value).items()})
    return value


#: Largest count or width of experts that is believed.
_MOST = 1 << 20


def _whole(key: Key, config: Mapping[str, Any]) -> int:
    """An int entry; a per-layer list of equal ints counts as one (HunYuan)."""
    value = key.get(config)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise CheckpointError(
            f"config.json: {key.name} must be one whole number up to {_MOST} ({value!r})"
        )
    return value
