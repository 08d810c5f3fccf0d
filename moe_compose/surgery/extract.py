"""Extract: one expert of an MoE as a dense checkpoint, the inverse of upcycling.

The expert becomes the FFN of every layer, scaled as if it got all of the routing weight; an ungated
shared expert's neurons stand beside its own. All else is carried back to the dense family's names.
What upcycling made silent (`down = 0`), as the record beside the checkpoint says, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from moe_compose.architectures import Architecture, Twin, all_architectures
from moe_compose.architectures.base import Computed, Key
from moe_compose.architectures.common import HEAD_DIM
from moe_compose.architectures.refused import why_not
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.dense_config import dense_config
from moe_compose.surgery.expert_names import index_of
from moe_compose.surgery.extract_options import ExtractOptions
from moe_compose.surgery.ffn import FFN, matrix, read_expert, read_ffn
from moe_compose.surgery.history import is_constant
from moe_compose.surgery.indices import Picks
from moe_compose.surgery.joined import joined
from moe_compose.surgery.past import constants_of, dense_ancestor
from moe_compose.surgery.plan import OutputTensor, Plan, Preservation
from moe_compose.surgery.preservation import output_factor
from moe_compose.surgery.roles import Roles
from moe_compose.surgery.selection import moe_form
from moe_compose.surgery.shared_tensors import layer_of, natural
from moe_compose.surgery.transforms import Concat, Read, Take
from moe_compose.surgery.upcycle_options import UpcycleOptions

_KEY = "moe"


def extract(source: TensorSource, options: ExtractOptions) -> Plan:
    """Plan a dense checkpoint around one expert of an MoE. Reads no weights.

    Args:
        source: an MoE of a family that a dense one grows into.
        options: which expert, and which dense family.

    Returns:
        A checked plan. Of an MoE by `upcycle` with the method copy, it has the dense model's bytes.

    Raises:
        OptionError: there is no such expert.
        UnsupportedError: no dense family computes the same around the FFN, or none has a home for
            all that the config says.

    Example:
        >>> plan = extract(Checkpoint.open("moe"), ExtractOptions(expert="math"))
        >>> plan.config["model_type"]
        'llama'
    """
    form, moe = moe_form(source)
    expert = index_of(source.config, moe.num_experts, options.expert)
    work = _Extraction(source, form, expert)
    dense, twin, config = work.choose(options.target)
    outputs = [*work.ffns(dense), *work.carried(twin)]
    plan = Plan(
        operation="extract",
        options={**asdict(options), "target": dense.model_type},
        config=config,
        outputs=tuple(sorted(outputs, key=lambda o: natural(o.name))),
        sources={_KEY: source},
        preservation=Preservation(
            "none", f"expert {expert} of {moe.num_experts} answers for all tokens"
        ),
        files={n: p for n, p in source.files.items() if n != "README.md" and n[-3:] != ".py"},
        dropped=work.dropped(outputs, twin),
        notes=tuple(work.notes()),
        card=source.files.get("README.md"),
        decided={"expert": expert, "target": dense.model_type},
    )
    return plan.check()


class _Extraction:
    """One expert of one MoE.

    Args:
        source: the MoE.
        form: its family's, in the layout that it has.
        expert: its id.
    """

    def __init__(self, source: TensorSource, form: Architecture, expert: int) -> None:
        self._source, self._form, self._expert = source, form, expert
        self._config, self._moe = source.config, form.moe(source.config)
        self._constants = constants_of(source)
        self._roles, self._sparse = Roles(form), self._moe.sparse_layers
        self._refuse()
        asked = UpcycleOptions(num_experts=self._moe.num_experts, top_k=self._moe.top_k)
        self._factor = 1 / output_factor(form, source.config, asked)
        assert form.experts is not None
        shared = form.shared if self._moe.shared_width else None
        self._with_shared = shared is not None and not self._is_silent(shared.matrices.down)
        average = shared.average if shared is not None else False
        average = average.get(source.config) if isinstance(average, Key) else average
        self._share = 0.5 if average else 1.0
        self._with_expert = not (self._with_shared and self._is_silent(form.experts.down))

    def _is_silent(self, template: str) -> bool:
        names = [template.format(i=i, e=self._expert) for i in self._sparse]
        return all(is_constant(n, self._constants) for n in names)

    def _refuse(self) -> None:
        """What no dense FFN computes."""
        form, label = self._form, self._source.label
        problems = []
        if form.parallel_mlp:
            problems.append("its experts stand beside a dense FFN, each with norms of its own")
        shared = form.shared if self._moe.shared_width else None
        if shared and shared.gate and not self._is_silent(shared.matrices.down):
            problems.append("its shared expert is behind a gate that each token opens differently")
        if self._config.get("quantization_config"):
            problems.append("it is quantised; extract from the plain weights, and quantise again")
        if problems:
            raise UnsupportedError(f"no expert of {label} is a dense FFN", problems=problems)

    @property
    def _width(self) -> int:
        expert = self._moe.expert_width if self._with_expert else 0
        return expert + (self._moe.shared_width if self._with_shared else 0)

    def choose(self, target: str | None) -> tuple[Architecture, Twin, dict[str, Any]]:
        """The dense family, and the config in its words."""
        form, tried = self._form, {}
        grown_from = dense_ancestor(self._source, {t.dense for t in form.twins})
        twins = sorted(form.twins, key=lambda t: t.dense != grown_from)
        for twin in twins:
            dense = all_architectures()[twin.dense].of({**self._config, form.num_experts.name: 0})
            config, problems = dense_config(
                self._config, form, dense, twin,
                width=self._width, shown=self._shown(),
            )  # fmt: skip
            problems += [*self._other_widths(), *self._left_over(twin)]
            if target in (None, twin.dense) and not problems:
                return dense, twin, config
            tried[twin.dense] = problems
        raise self._no_family(target, tried)

    def _shown(self) -> dict[str, Any]:
        """Entries that the tensors show, whether the config states them or not."""
        tensors, heads = self._source.tensors, self._config.get("num_key_value_heads")
        found: dict[str, Any] = {"tie_word_embeddings": self._form.head not in tensors}
        keys = next((t for n, t in tensors.items() if n.endswith(".k_proj.weight")), None)
        if keys is not None and isinstance(heads, int) and heads:
            found["head_dim"] = keys.shape[0] // heads
        return found

    def _no_family(
        self, target: str | None, tried: Mapping[str, Sequence[str]]
    ) -> UnsupportedError:
        family, fitting = self._form.model_type, [name for name, why in tried.items() if not why]
        name = target or next(iter(tried), None)
        if name is None or name not in tried:
            return UnsupportedError(
                f"no dense {name or 'family'} computes what {family} does around its experts: "
                f"{why_not(name or '', family)}",
                hint=f"Dense families that do: {', '.join(tried)}." if tried else "",
            )
        return UnsupportedError(
            f"{self._source.label} ({family}) cannot become {name}: not all of it has a home there",
            problems=tried[name],
            hint=f"It can become {' or '.join(fitting)} (--target)." if fitting else "",
        )

    def _other_widths(self) -> Iterator[str]:
        """Layers that keep a dense FFN, of another width."""
        if not all(self._moe.sparse):
            found = self._form.width.integer(self._config)
            if found != self._width:
                yield f"dense layers have FFNs of width {found}, the expert has {self._width}"

    def _left_over(self, twin: Twin) -> Iterator[str]:
        """Tensors that the twin adds as constants, and that need not be constant any more."""
        for fill in twin.fills:
            for name in self._source.tensors:
                if layer_of(fill.name, name) is not None and not is_constant(name, self._constants):
                    yield f"{name} has no home"
                    break

    def ffns(self, dense: Architecture) -> Iterator[OutputTensor]:
        """The FFN of every layer, under the dense family's names."""
        assert dense.mlp is not None
        for layer, sparse in enumerate(self._moe.sparse):
            ffn = self._ffn(layer) if sparse else read_ffn(self._source, self._form, layer, _KEY)
            for template in dense.mlp.names:
                yield OutputTensor(template.format(i=layer), matrix(dense.mlp, template, ffn))

    def _ffn(self, layer: int) -> FFN:
        """The expert's neurons, and the shared expert's, each rounded once."""
        parts = []
        if self._with_expert:
            own = read_expert(self._source, self._form, layer, self._expert, _KEY)
            dtype = own.down.spec.dtype
            parts.append(own.scaled(1.0, self._factor * self._share).stored_as(dtype))
        if self._with_shared:
            parts.append(self._shared(layer).scaled(1.0, self._share))
            dtype = parts[0].down.spec.dtype
            parts = [p.stored_as(dtype) for p in parts]
        return joined(parts)

    def _shared(self, layer: int) -> FFN:
        """The shared experts of a layer, which are stored as one."""
        shared = self._form.shared
        assert shared is not None
        width = Computed(name="width of the shared experts", formula=shared.total_width)
        form = replace(self._form, mlp=shared.matrices, width=width)
        return read_ffn(self._source, form, layer, _KEY)

    def carried(self, twin: Twin) -> Iterator[OutputTensor]:
        """What is no FFN and no router, under the dense family's names."""
        for name, info in self._source.tensors.items():
            if self._left_behind(name, twin) or self._is_ffn(name):
                continue
            read = Read(_KEY, info)
            found = self._fused(name, twin)
            if found is not None:
                yield from found
            elif any(layer_of(t, name) is not None for t in twin.interleave):
                order = _halves(info.shape[0], HEAD_DIM.integer(self._config))
                yield OutputTensor(name, Take(read, order))
            else:
                yield OutputTensor(_name_before(name, twin), read)

    def _fused(self, name: str, twin: Twin) -> list[OutputTensor] | None:
        """The dense family's tensor of which this is a part, with the first part; none with the
        others; None where it is a part of none.
        """
        for split in twin.splits:
            for template, _ in split.parts:
                layer = layer_of(template, name)
                if layer is None:
                    continue
                names = [t.format(i=layer) for t, _ in split.parts]
                whole = Concat(tuple(Read(_KEY, self._source.tensors[n]) for n in names))
                fused = OutputTensor(split.source.format(i=layer), whole)
                return [fused] if name == names[0] else []
        return None

    def _is_ffn(self, name: str) -> bool:
        """A matrix of a dense layer's FFN."""
        lie = self._form.mlp
        layers = [layer_of(t, name) for t in lie.names] if lie is not None else []
        return any(i is not None and not self._moe.sparse[i] for i in layers)

    def _left_behind(self, name: str, twin: Twin) -> str:
        """Why a tensor has no part in a dense model; empty if it has, or nothing says why not."""
        form, layers = self._form, len(self._moe.sparse)
        shared = (*form.shared.matrices.names, form.shared.gate) if form.shared else ()
        if any(name.startswith(prefix.format(n=layers)) for prefix in form.mtp):
            return "a multi-token-prediction layer"
        if (role := self._roles.of(name)) is not None:
            return "chooses among experts" if role.kind == "router" else "of experts not taken"
        if any(layer_of(t, name) is not None for t in shared):
            return "of a shared expert that upcycling made silent"
        if any(layer_of(fill.name, name) is not None for fill in twin.fills):
            return "a constant that upcycling added"
        return ""

    def dropped(self, outputs: Sequence[OutputTensor], twin: Twin) -> dict[str, str]:
        """`moe:tensor` → why it is not used."""
        used = {leaf.tensor.name for o in outputs for leaf in o.value.leaves()}
        unused = ((n, self._left_behind(n, twin)) for n in self._source.tensors if n not in used)
        return {f"{_KEY}:{name}": why for name, why in unused if why}

    def notes(self) -> Iterator[str]:
        """What a user should know before writing."""
        if self._with_shared:
            yield "the shared expert's neurons stand beside the expert's"
        elif self._moe.shared_width:
            yield "the shared expert is left out: by the record it is silent, and was not trained"
        if self._moe.routing.sums_to is None:
            yield (
                "the mixture does not renormalise its weights: the expert is scaled by "
                f"{self._factor:.4g} = k/E, what a router without preferences gives to k equal ones"
            )


def _name_before(name: str, twin: Twin) -> str:
    """What a tensor was called before the twin renamed it."""
    for old, new in twin.renames.items():
        if (layer := layer_of(new, name)) is not None:
            return old.format(i=layer)
    return name


def _halves(rows: int, head_dim: int) -> Picks:
    """Row order that turns neighbouring rotary pairs (2m, 2m + 1) into half-split ones
    (m, m + d/2).
    """
    one = [2 * m + side for side in (0, 1) for m in range(head_dim // 2)]
    return Picks(tuple(h * head_dim + r for h in range(rows // head_dim) for r in one))
