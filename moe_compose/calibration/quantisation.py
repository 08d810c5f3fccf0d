"""How many bits each expert needs, from what it does on text. Nothing is quantised here: the plan
is a recipe for a quantiser.

Experts have equal sizes, so with two widths the sum of their errors Σ s_e·ε(b_e) is smallest when
those with the smallest sensitivity s_e get the lower one, whatever the error ε of either width.
Sensitivities of experts are parts of their layer's, so that layers count alike; super experts
(2507.23279), without which a model breaks, always get the higher width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import Architecture, MoE
from moe_compose.calibration.pruning import check_statistics, super_experts
from moe_compose.calibration.quant_options import QuantPlanOptions
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.roles import Roles
from moe_compose.surgery.selection import moe_form

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

#: Sizes of groups that are tried, after the one asked for.
_GROUPS = (128, 64, 32)

#: Bits of a group's scale.
SCALE_BITS = 16

#: Widths that vLLM's kernels for packed weights know.
_SERVED = (4, 8)


@dataclass(frozen=True, slots=True)
class LayerBits:
    """A layer of the plan.

    Attributes:
        layer: which.
        sensitivity: of each expert, or the layer's for all of them.
        bits: of each expert's weights.
        guarded: super experts among them.
    """

    layer: int
    sensitivity: tuple[float, ...]
    bits: tuple[int, ...]
    guarded: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """Bits for every expert, and what comes of them.

    Attributes:
        source, digest: the checkpoint.
        options: as asked.
        layers: what each layer gets.
        stem: of a layer's modules: `model.layers`.
        group_size: weights that share a scale; None: a row of the matrix does.
        mean_bits: of an expert's weight, scales left out.
        bytes: of all experts: as they are, and as planned, scales counted.
        total_bytes: of the whole checkpoint, the same two; only experts change.
        low_weight: part of the sensitivity of all that lies where the lower bits go.
        notes: what a user should know.
    """

    source: str
    digest: str
    options: QuantPlanOptions
    layers: tuple[LayerBits, ...]
    stem: str
    group_size: int | None
    mean_bits: float
    bytes: tuple[int, int]
    total_bytes: tuple[int, int]
    low_weight: float
    notes: tuple[str, ...]

    def count(self, bits: int) -> int:
        """Experts that get so many bits."""
        return sum(layer.bits.count(bits) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with formula and source of the sensitivities."""
        said = {"formula": self.options.formula, "formula_source": self.options.reference}
        return asdict(self) | said


def plan_quantisation(
    source: TensorSource, stats: ExpertStats, options: QuantPlanOptions | None = None
) -> QuantPlan:
    """Decide the bits of every expert. Reads no weights but the routers', to know the checkpoint.

    Args:
        source: an MoE whose experts are not quantised yet.
        stats: what `calibrate` measured on it.
        options: how many get which bits, and by what.

    Raises:
        OptionError: options that cannot be meant.
        UnsupportedError: no MoE, experts that no quantiser sees one by one, or quantised ones.
        CheckpointError: the statistics are of another checkpoint.

    Example:
        >>> plan = plan_quantisation(moe, stats, QuantPlanOptions(budget=5))  # doctest: +SKIP
        >>> plan.mean_bits                                                    # doctest: +SKIP
        5.0
    """
    options = options or QuantPlanOptions()
    if problems := list(options.problems()):
        raise OptionError("these options cannot be meant", problems=problems)
    form, moe = moe_form(source)
    _check_layout(source, form)
    check_statistics(stats, source)
    sensitive = _sensitivities(stats, options)
    guarded = super_experts(stats, form.layers.integer(source.config))
    low = _lowest(sensitive, guarded, options)
    layers = tuple(_layer(i, s, low, guarded.get(i, ()), options) for i, s in sensitive.items())
    group = _group(moe, options.group_size)
    bits = [b for layer in layers for b in layer.bits]
    mean = sum(bits) / len(bits)
    scales = SCALE_BITS / group if group else SCALE_BITS / min(moe.hidden, moe.expert_width)
    elements, before = _size(source, form, moe)
    after = round(elements * (mean + scales) / 8)
    total = sum(info.nbytes for info in source.tensors.values())
    weight = sum(map(sum, sensitive.values()))
    at_low = sum(sensitive[i][e] for i, e in low)
    return QuantPlan(
        source=source.label,
        digest=source.digest(),
        options=options,
        layers=layers,
        stem=form.experts.down.partition(".{i}")[0] if form.experts else "",
        group_size=group,
        mean_bits=mean,
        bytes=(before, after),
        total_bytes=(total, total - before + after),
        low_weight=at_low / weight if weight else 0.0,
        notes=tuple(_notes(form, options, group, guarded)),
    )


def _check_layout(source: TensorSource, form: Architecture) -> None:
    """Refuse what a quantiser of matrices cannot take apart.

    Raises:
        UnsupportedError: so it is.
    """
    assert form.experts is not None
    if source.config.get("quantization_config"):
        raise UnsupportedError(
            f"{source.label} is quantised already", hint="Plan for the original checkpoint."
        )
    if form.experts.flat:
        raise UnsupportedError(
            f"experts of {source.label} lie in one matrix, row after row: llm-compressor does not "
            "take them apart, so they cannot get bits one by one"
        )


def _size(source: TensorSource, form: Architecture, moe: MoE) -> tuple[int, int]:
    """Elements and bytes of all routed experts of the decoder."""
    roles = Roles(form)
    blocks = {roles.block(i) for i in moe.sparse_layers}
    placed = ((info, roles.of(name)) for name, info in source.tensors.items())
    found = [
        info for info, role in placed if role and role.kind != "router" and role.block in blocks
    ]
    return sum(t.numel for t in found), sum(t.nbytes for t in found)


def _sensitivities(stats: ExpertStats, options: QuantPlanOptions) -> dict[int, list[float]]:
    """Layer → sensitivity of each expert."""
    found: dict[int, list[float]] = {}
    tokens = max(stats.tokens(), 1)
    for layer in stats.layers:
        sums = stats.sums(layer)
        if options.per == "layer":
            inputs = float(stats.layers[layer].input_HC.sum())
            share = float(sums["gated_norm"].sum()) / max(inputs, 1e-300)
            found[layer] = [share] * stats.experts(layer)
            continue
        worth = {
            "weighted-ean": sums["gated_norm"],
            "mc": sums["count"] / tokens * sums["gate"] / tokens,
            "frequency": sums["count"],
        }[options.measure]
        found[layer] = (worth / worth.sum().clamp(min=1e-300)).tolist()
    return found


def _lowest(
    sensitive: Mapping[int, list[float]],
    guarded: Mapping[int, tuple[int, ...]],
    options: QuantPlanOptions,
) -> set[tuple[int, int]]:
    """Layer and expert of those that get the lower bits: the least sensitive; at a tie the first.

    A budget is never exceeded; a share is rounded.
    """
    if options.per == "layer":
        free = [i for i in sorted(sensitive) if not guarded.get(i)]
        order = sorted(free, key=lambda i: sensitive[i][0])
        wanted = _count(len(sensitive), options)
        return {(i, e) for i in order[:wanted] for e in range(len(sensitive[i]))}
    every = [(i, e) for i in sorted(sensitive) for e in range(len(sensitive[i]))]
    free_experts = [(i, e) for i, e in every if e not in guarded.get(i, ())]
    ranked = sorted(free_experts, key=lambda p: sensitive[p[0]][p[1]])
    return set(ranked[: _count(len(every), options)])


def _count(total: int, options: QuantPlanOptions) -> int:
    exact = options.low_share() * total
    return math.ceil(exact - 1e-9) if options.budget is not None else round(exact)


def _layer(
    layer: int,
    sensitivity: list[float],
    low: set[tuple[int, int]],
    guarded: tuple[int, ...],
    options: QuantPlanOptions,
) -> LayerBits:
    bits = [
        options.bits_low if (layer, e) in low else options.bits_high
        for e in range(len(sensitivity))
    ]
    return LayerBits(layer, tuple(sensitivity), tuple(bits), guarded)


def _group(moe: MoE, asked: int) -> int | None:
    """The largest size, up to the one asked for, that divides the rows of all matrices."""
    sizes = (asked, *(g for g in _GROUPS if g < asked))
    fits = (g for g in sizes if not moe.hidden % g and not moe.expert_width % g)
    return next(fits, None)


def _notes(
    form: Architecture,
    options: QuantPlanOptions,
    group: int | None,
    guarded: Mapping[int, tuple[int, ...]],
) -> Iterator[str]:
    if options.per == "expert":
        yield (
            "vLLM gives all experts of a layer one scheme and refuses several widths in a layer: "
            "per = layer makes a plan that it can load"
        )
    if odd := [b for b in (options.bits_low, options.bits_high) if b not in _SERVED]:
        yield f"vLLM has kernels for 4 and 8 bits, not for {' and '.join(map(str, odd))}"
    if form.experts is not None and form.experts.stacked:
        yield (
            "all experts of a layer lie in one tensor on the disk: llm-compressor takes them apart "
            "when it loads them (load_quantizable_moe), and stores them one by one"
        )
    if group != options.group_size:
        size = f"{group} weights share a scale" if group else "each row has one scale"
        yield f"groups of {options.group_size} do not divide the experts' rows, so {size}"
    if guarded:
        named = "; ".join(f"layer {i}: {', '.join(map(str, e))}" for i, e in guarded.items())
        yield f"super experts keep {options.bits_high} bits ({named})"
    if options.per == "expert":
        yield "layers count alike: how much a layer matters to the model is not measured"
