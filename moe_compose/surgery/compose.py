"""Compose: independently trained models become the experts of one.

The base gives the family, the config and the tokenizer. Each expert's FFN comes from a donor: a
dense model of the base's family, an anchored pair, an expert of another mixture, or a LoRA adapter.
What is no expert comes from the base, or is blended over the donors' models (METHODS, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.arithmetic import cast
from moe_compose.surgery.averages import Mean
from moe_compose.surgery.blends import blend
from moe_compose.surgery.compose_options import ComposeOptions, compose_option_problems
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.experts import sparse_half
from moe_compose.surgery.ffn import ffn_dtype, read_ffn
from moe_compose.surgery.indices import Rows
from moe_compose.surgery.members import BASE, Members
from moe_compose.surgery.plan import UNTRAINED_ROUTER, OutputTensor, Plan, Preservation
from moe_compose.surgery.shared_tensors import natural
from moe_compose.surgery.transforms import Concat, Read, Take, Transform
from moe_compose.surgery.upcycle_options import output_dtype


def plan_composition(
    base: TensorSource, donors: Mapping[str, Donor], options: ComposeOptions
) -> Plan:
    """Plan an MoE whose experts are others' FFNs. Reads no weights.

    Args:
        base: a dense checkpoint.
        donors: name → where the expert comes from, in the order of the experts.
        options: what is wanted, with `shared` and `router` settled; rows that text decides
            (`ridge`, `hidden`, `domain`) start at zero.

    Returns:
        A checked plan; `plan.decided["experts"]` are the names, in order.

    Raises:
        OptionError: options that cannot be meant, all of them at once.
        UnsupportedError: models that cannot become one, every difference named.
    """
    if problems := list(compose_option_problems(options, list(donors))):
        raise OptionError("these options cannot be meant", problems=problems)
    members = Members(base, donors, options)
    if members.problems:
        raise UnsupportedError(
            f"these models cannot be composed with {base.label}", problems=members.problems
        )
    work = _Composition(members, options)
    outputs = work.outputs()
    used = {f"{r.source}:{r.tensor.name}" for o in outputs for r in o.value.leaves()}
    dropped = {
        name: f"shared parameters are {options.shared}; the rest are experts"
        for name in members.tensors()
        if name not in used
    }
    plan = Plan(
        operation="compose",
        options={
            **asdict(options),
            "target": members.form.model_type,
            "base": base.label,
            "expert": [f"{name}={donor.label}" for name, donor in donors.items()],
        },
        config=members.config,
        outputs=tuple(sorted(outputs, key=lambda o: natural(o.name))),
        sources=members.sources,
        preservation=work.preservation(),
        files={n: p for n, p in base.files.items() if n != "README.md" and not n.endswith(".py")},
        dropped=dropped,
        notes=tuple(work.notes()),
        card=base.files.get("README.md"),
        decided={"experts": list(members.names)},
    )
    return plan.check()


class _Composition:
    """One composition under way."""

    def __init__(self, members: Members, options: ComposeOptions) -> None:
        self._members, self._options = members, options
        self.form, self.config = members.form, members.config

    def outputs(self) -> list[OutputTensor]:
        """Every tensor of the result."""
        members = self._members
        stored = output_dtype(members.upcycle) or ffn_dtype(members.base, members.dense)
        outputs = self._shared()
        for layer in self.form.moe(self.config).sparse_layers:
            own = read_ffn(members.base, members.dense, layer, BASE)
            experts = [members.expert(n, layer, own).stored_as(stored) for n in members.names]
            rows = self._trained(layer) if self._options.router == "trained" else {}
            outputs += sparse_half(
                self.form, self.config, layer, own, experts, members.upcycle, stored, rows
            )
        return outputs

    def _trained(self, layer: int) -> dict[str, Transform]:
        """Router tensors from the pairs: each one's second row, and the mean of the first ones for
        the anchor.
        """
        made: dict[str, Transform] = {}
        pairs = list(self._members.givers.values())
        for t in self.form.router:
            name = t.name.format(i=layer)
            reads = [Read(g.key, g.source.tensors[name]) for g in pairs if name in g.source.tensors]
            if t.kind in ("other", "table") or len(reads) != len(pairs) or t.dim or t.lead:
                continue
            own: list[Transform] = [Take(r, Rows(1, 2)) for r in reads]
            if self._options.base_expert:
                anchors = tuple(Take(r, Rows(0, 1)) for r in reads)
                mean = Mean(anchors, (1 / len(anchors),) * len(anchors))
                own.insert(0, cast(mean, reads[0].spec.dtype))
            made[name] = Concat(tuple(own))
        return made

    def _shared(self) -> list[OutputTensor]:
        """What is no expert, blended."""
        kind, names = self._options.shared or "base", self._members.names
        base = self._members.carried(BASE)
        if kind == "base":
            return [OutputTensor(n, self._stored(x, x)) for n, x in base.items()]
        against_base = kind in ("ties", "dare", "task-arithmetic")
        models = [n for n in names if n != BASE] if against_base else list(names)
        parts = {n: self._members.carried(n) for n in models}
        weights = [self._options.weights.get(n, 1.0) for n in models]
        outputs = []
        for name, own in base.items():
            others = [parts[n].get(name, own) for n in models]
            if any(o.spec.shape != own.spec.shape for o in others):
                continue  # named in `problems`
            value = blend(
                "weighted" if kind == "mean" else kind,
                own,
                others,
                weights,
                density=self._options.density,
                scale=self._options.scale,
                draw=Draw(self._options.seed, f"{kind} of {name}"),
            )
            outputs.append(OutputTensor(name, self._stored(value, own)))
        return outputs

    def _stored(self, value: Transform, own: Transform) -> Transform:
        dtype = output_dtype(self._members.upcycle)
        if own.spec.dtype not in FLOAT_DTYPES:
            return own
        return cast(value, dtype or own.spec.dtype)

    def preservation(self) -> Preservation:
        """Exact where all experts, and all that is shared, are one model's."""
        members, shared = self._members, self._options.shared
        models = {members.identity(n) for n in members.names}
        sums = self.form.moe(self.config).routing.sums_to
        own = models == {members.identity(BASE)} or shared in ("mean", "weighted")
        if len(models) == 1 and sums is not None and own:
            name = members.names[-1]
            giver = members.givers.get(name)
            if giver is None or (giver.adapter is None and giver.expert is None):
                who = members.base.label if giver is None else giver.source.label
                why = f"every expert is {who}'s, under weights that sum to 1"
                return Preservation("exact", why, members.twin.accuracy, reference=name)
        return Preservation(
            "none",
            f"experts of {len(members.names)} models under one router; shared parameters: {shared}",
        )

    def notes(self) -> Iterator[str]:
        """What a user should know."""
        router, k = self._options.router, self._options.top_k
        if router in ("random", "zeros"):
            yield f"{UNTRAINED_ROUTER} ({router} rows): train it before use"
        if k == 1 and self.form.moe(self.config).routing.sums_to is not None:
            yield (
                "with top_k = 1 and renormalised weights the router receives no gradient: train "
                "with top_k ≥ 2"
            )
        stored = self._options.dtype or ffn_dtype(self._members.base, self._members.dense)
        first = self.form.moe(self.config).sparse_layers[0]
        for name, giver in self._members.givers.items():
            theirs = giver.ffn(first).down.spec.dtype
            if theirs != ffn_dtype(self._members.base, self._members.dense):
                yield f"{name} is {theirs}, and rounded to {stored}"
