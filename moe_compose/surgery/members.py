"""The models of a composition: which there are, whether they fit together, and what each holds
outside its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_compose.architectures import find
from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.compatible import (
    config_differences,
    dense_differences,
    tokenizer_differences,
)
from moe_compose.surgery.compose_options import ComposeOptions
from moe_compose.surgery.donors import Donor, Giver
from moe_compose.surgery.expert_names import set_names
from moe_compose.surgery.ffn import FFN, as_it_is, ffn_dtype
from moe_compose.surgery.pairing import choose_target, dense_form, stated_config
from moe_compose.surgery.preservation import classify, output_factor, split_factor
from moe_compose.surgery.roles import Roles
from moe_compose.surgery.shared_tensors import carried
from moe_compose.surgery.target import target_config
from moe_compose.surgery.transforms import Read, Transform
from moe_compose.surgery.upcycle_options import UpcycleOptions, check_options

#: The plan's word for the base, and the name of its expert.
BASE = "base"


def upcycle_options(options: ComposeOptions, experts: int) -> UpcycleOptions:
    """The upcycle that has the target, the routers and the silent parts of a composition."""
    drawn = options.router == "random"
    return UpcycleOptions(
        num_experts=experts,
        top_k=options.top_k,
        target=options.target,
        router_init=None if drawn else "zeros",
        router_std=options.router_std if drawn else None,
        seed=options.seed,
        dtype=options.dtype,
    )


class Members:
    """The models of one composition.

    Args:
        base: a dense checkpoint.
        donors: name → where the expert comes from.
        options: of the composition, nothing left open.

    Attributes:
        names: of the experts, in order.
        form: the family of the result.
        config: its `config.json`.
        upcycle: the upcycle that has its target, its routers and its silent parts.
        givers: name → donor, ready to be drawn on.
        problems: why it cannot be, in words.
    """

    def __init__(
        self, base: TensorSource, donors: Mapping[str, Donor], options: ComposeOptions
    ) -> None:
        self.base, self._options = base, options
        self.names = (BASE, *donors) if options.base_expert else tuple(donors)
        self.upcycle = upcycle_options(options, len(self.names))
        self.dense = dense_form(base.config)
        stated = stated_config(base.config, self.dense)
        self.form, self.twin = choose_target(stated, self.dense, self.upcycle)
        check_options(self.upcycle, self.form, self.twin, self.dense, base.config)
        self.config = target_config(stated, self.dense, self.form, self.twin, self.upcycle)
        set_names(self.config, self.names)
        classify(
            self.form, self.config, self.twin, self.upcycle, ffn_dtype(base, self.dense)
        )  # refuses targets under which no expert computes what its FFN did
        self.givers = {name: Giver.of(d, name, base) for name, d in donors.items()}
        self.problems = list(self._problems())

    @property
    def sources(self) -> dict[str, TensorSource]:
        """Everything that is read from."""
        found: dict[str, TensorSource] = {BASE: self.base}
        for giver in self.givers.values():
            found |= giver.sources
        return found

    def tensors(self) -> Iterator[str]:
        """`source:tensor` of everything there is."""
        for key, source in self.sources.items():
            yield from (f"{key}:{name}" for name in source.tensors)

    def _problems(self) -> Iterator[str]:
        for name, giver in self.givers.items():
            yield from (f"{name} ({giver.source.label}): {p}" for p in self._unfit(giver))
        if self._options.router == "trained" and not all(map(is_pair, self.givers.values())):
            lone = [n for n, g in self.givers.items() if not is_pair(g)]
            yield (
                f"router = trained takes rows that come with anchored pairs (mixtures of two); "
                f"{', '.join(lone)} {'is' if len(lone) == 1 else 'are'} none"
            )

    def _unfit(self, giver: Giver) -> Iterator[str]:
        """Why a donor cannot give an expert to this model."""
        family = giver.form.model_type
        if giver.expert is None and family != self.dense.model_type:
            yield f"it is a {family}, the base is a {self.dense.model_type}"
        elif giver.expert is not None and family != self.form.model_type:
            yield f"its experts are of {family}, the result is a {self.form.model_type}"
        elif giver.expert is None and giver.source is not self.base:
            yield from dense_differences(self.base, giver.source, self.dense)
        elif giver.expert is not None:
            counts = {
                k
                for key in (self.form.num_experts, self.form.top_k)
                for k in (key.name, *key.aliases)
            }
            yield from config_differences(self.config, giver.source.config, besides=counts)
            yield from tokenizer_differences(self.base, giver.source)
        beside = giver.adapter.others(giver.form) if giver.adapter is not None else ()
        if beside and self._options.adapter_shared == "refuse":
            yield (
                f"the adapter also changes {', '.join(sorted(beside)[:3])}, which all experts "
                "share (adapter_shared = average takes its part of it)"
            )

    def expert(self, name: str, layer: int, own: FFN) -> FFN:
        giver = self.givers.get(name)
        if giver is not None and giver.expert is not None:
            return giver.ffn(layer)  # of the target's family: what it must be scaled by, it is
        ffn = own if giver is None else giver.ffn(layer)
        factor = output_factor(self.form, self.config, self.upcycle)
        return ffn.scaled(*split_factor(factor, 1))

    def carried(self, name: str) -> dict[str, Transform]:
        """A model's tensors outside routers and experts, under the result's names."""
        giver = self.givers.get(name)
        if giver is None or giver.expert is None:
            source = self.base if giver is None else giver.source
            found = carried(
                source, self.dense, self.form, self.twin, self.config, None, {}, name,
                as_it_is if giver is None else giver.read,
            )  # fmt: skip
            return {o.name: o.value for o in found}
        roles = Roles(giver.form)
        return {
            n: giver.read(Read(name, info))
            for n, info in giver.source.tensors.items()
            if roles.of(n) is None
        }

    def identity(self, name: str) -> tuple[Any, ...]:
        """Two experts of one identity are the same: digests do not tell two fine-tunes apart."""
        giver = self.givers.get(name)
        if giver is None:
            return (self.base.weight_files or id(self.base), None, None)
        adapter = giver.adapter.weight_files if giver.adapter is not None else None
        return (giver.source.weight_files or id(giver.source), giver.expert, adapter)


def is_pair(giver: Giver) -> bool:
    """A mixture of two, of which the second expert is taken."""
    if giver.expert != 1 or giver.adapter is not None:
        return False
    return giver.form.moe(giver.source.config).num_experts == 2


def all_pairs(donors: Sequence[Donor]) -> bool:
    """Whether every donor can be an anchored pair, as far as a config tells."""
    for donor in donors:
        form = find(donor.source.config) if donor.source is not None else None
        if form is None or donor.source is None or not form.is_moe:
            return False
        if form.moe(donor.source.config).num_experts != 2:
            return False
    return bool(donors)
