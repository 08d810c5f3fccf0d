"""Upcycle: a dense checkpoint becomes a mixture of experts.

Everything outside the FFN is copied as bytes; each FFN becomes E experts and a router. The methods
differ in what the experts start as (`METHODS`), and in whether the result computes what the dense
model did; that is stated in the plan before anything is written, and measured afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_compose.architectures import Architecture, Twin, all_architectures, find, targets_of
from moe_compose.architectures.dialects import CONFIG_DTYPES
from moe_compose.architectures.refused import NO_TARGET, why_not
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.experts import sparse_layer
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.preservation import classify
from moe_compose.surgery.shared_tensors import carried, common_dtype, natural
from moe_compose.surgery.target import target_config

Method = Literal["copy", "granular", "shared", "noise", "drop", "shuffle"]


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A way to make experts out of an FFN.

    Attributes:
        summary: one line.
        paper: title and arXiv id.
    """

    summary: str
    paper: str


METHODS: Mapping[str, MethodInfo] = {
    "copy": MethodInfo(
        "every expert a copy of the FFN; computes what the dense model computes",
        "Sparse Upcycling, arXiv 2212.05055",
    ),
    "granular": MethodInfo(
        "finer experts of 1/G the width, in virtual groups of G that are chosen together; exact",
        "Upcycling LLMs into MoE, arXiv 2410.07524",
    ),
    "shared": MethodInfo(
        "the FFN becomes the shared expert, routed experts start silent (down = 0); exact and diverse",
        "zero-initialised routed branch; shared experts: DeepSeekMoE, arXiv 2401.06066",
    ),
    "noise": MethodInfo(
        "copies, with Gaussian noise on a fraction of each expert's neurons",
        "random noise upcycling, as in arXiv 2502.19261 section 4",
    ),
    "drop": MethodInfo(
        "copies, with a fraction of each expert's neurons redrawn from their own statistics; pays off after long training",
        "Drop-Upcycling, arXiv 2502.19261",
    ),
    "shuffle": MethodInfo(
        "neurons shuffled, cut into finer experts, half of each redrawn; not function-preserving",
        "Qwen1.5-MoE and Qwen2, arXiv 2407.10671",
    ),
}

#: What is refused unless asked for by name (`allow`): inexact variants of exact methods.
ALLOWANCES: Mapping[str, str] = {
    "unnormalised": "routing whose weights do not sum to 1: only approximately exact, with a small router",
    "independent-rows": "granular experts with a router row each instead of one per virtual group: never exact",
    "split-groups": "top_k that is no multiple of the granularity: the last virtual group is cut",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UpcycleOptions:
    """Options of `upcycle`. Field, keyword, recipe key and command-line flag have one name.

    Attributes:
        num_experts: Routed experts per sparse layer in the result.
        top_k: Experts that each token passes through.
        method: How experts start: copy, granular, shared, noise, drop, or shuffle.
        target: MoE family of the result, such as mixtral; by default the most portable exact one.
        granularity: G: experts have 1/G of the dense FFN's width (granular, shared, shuffle).
        ratio: Fraction of each expert's neurons that noise touches, or that drop, shuffle and
            shared redraw.
        noise_std: Standard deviation of the noise, in units of the matrix's own.
        layers: Layers that become sparse: all, every:2, 4-11, or 1,3,5 (counted from 0).
        router_init: Law of the router's weights: normal, uniform, or zeros; by default the method's
            own.
        router_std: Standard deviation of the router's weights; by default 0.02, or 0.002 where
            exactness needs it.
        seed: Seed of every random draw.
        dtype: Convert weights to float32, bfloat16 or float16; by default they keep their own.
        allow: Inexact variants to accept by name: unnormalised, independent-rows, split-groups.
    """

    num_experts: int = 8
    top_k: int = 2
    method: Method = "copy"
    target: str | None = None
    granularity: int = 1
    ratio: float = 0.5
    noise_std: float = 0.02
    layers: str = "all"
    router_init: Literal["normal", "uniform", "zeros"] | None = None
    router_std: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    allow: tuple[str, ...] = ()


def upcycle(source: TensorSource, options: UpcycleOptions) -> Plan:
    """Plan an MoE whose experts start from a dense model's FFNs. Reads no weights.

    Args:
        source: a dense checkpoint (or a plan of one).
        options: what is wanted.

    Returns:
        A checked plan; `plan.preservation` says how exact it is.

    Raises:
        OptionError: options that cannot be meant, all of them at once.
        UnsupportedError: no exact target, or a fact of the source (rope, window, bias, norm) that
            has no home in it.

    Example:
        >>> plan = upcycle(Checkpoint.open("dense"), UpcycleOptions(num_experts=8, top_k=2))
        >>> plan.preservation.kind
        'exact'
    """
    dense = _dense_form(source.config)
    form, twin = _target(dense, options)
    _check_options(options, form, dense, source.config)
    config = target_config(source.config, dense, form, twin, options)
    preservation = classify(form, config, twin, options, common_dtype(source))
    dtype = _output_dtype(options)
    files = {n: p for n, p in source.files.items() if n != "README.md" and not n.endswith(".py")}
    dropped: dict[str, str] = {}
    outputs = carried(source, dense, form, twin, config, dtype, dropped)
    for layer in form.moe(config).sparse_layers:
        outputs += sparse_layer(source, dense, form, config, layer, options, dtype)
    plan = Plan(
        operation="upcycle",
        options={**asdict(options), "target": form.model_type},
        config=config,
        outputs=tuple(sorted(outputs, key=lambda o: natural(o.name))),
        sources={"dense": source},
        preservation=preservation,
        files=files,
        dropped=dropped,
        notes=tuple(_notes(form, config, options)),
        card=source.files.get("README.md"),
    )
    return plan.check()


def _dense_form(config: Mapping[str, Any]) -> Architecture:
    form = find(config)
    form = form.of(config) if form is not None else None
    model_type = str(config.get("model_type"))
    if form is not None and form.is_moe:
        raise UnsupportedError(
            f"{model_type} is a mixture of experts already; upcycle starts from a dense model"
        )
    if form is None or not targets_of(form.model_type):
        reason = NO_TARGET.get(model_type, "no pair is known for it")
        known = sorted({t.dense for a in all_architectures().values() for t in a.twins})
        raise UnsupportedError(
            f"no MoE family computes what a dense {model_type!r} computes: {reason}",
            hint=f"Dense families with an exact target: {', '.join(known)}.",
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            "the source is quantised (quantization_config); experts are made from plain weights",
            hint="Upcycle the unquantised checkpoint, and quantise the result.",
        )
    return form


def _target(dense: Architecture, options: UpcycleOptions) -> tuple[Architecture, Twin]:
    """The target asked for, or the first in the registry, whose order is by portability."""
    targets = {a.model_type: a for a in targets_of(dense.model_type)}
    if options.method == "shared" and options.target is None:
        targets = {m: a for m, a in targets.items() if a.shared or a.parallel_mlp}
        if not targets:
            raise UnsupportedError(
                f"no target of {dense.model_type} has a shared expert, which --method shared needs"
            )
    name = options.target or next(iter(targets))
    form = targets.get(name)
    twin = form.twin_of(dense.model_type) if form else None
    if form is None or twin is None:
        raise UnsupportedError(
            f"{dense.model_type} → {name} is not exact: {why_not(dense.model_type, name)}",
            hint=f"Exact targets of {dense.model_type}: {', '.join(targets)}.",
        )
    return form, twin


def _check_options(
    options: UpcycleOptions, form: Architecture, dense: Architecture, config: Mapping[str, Any]
) -> None:
    """Every fault of the options, raised together."""
    o, width = options, dense.width.integer(config)
    finer = o.method in ("granular", "shared", "shuffle")
    rules = [
        (o.method in METHODS, f"method ({o.method}) must be one of {', '.join(METHODS)}"),
        (1 <= o.top_k <= o.num_experts, f"top_k ({o.top_k}) must be between 1 and num_experts ({o.num_experts})"),
        (o.granularity >= 1, f"granularity ({o.granularity}) must be at least 1"),
        (
            finer or o.granularity == 1,
            f"granularity ({o.granularity}) has no meaning for method {o.method}; use granular, shared or shuffle",
        ),
        (
            o.method != "granular" or o.granularity > 1,
            "method granular needs a granularity of 2 or more",
        ),
        (
            o.granularity < 1 or width % o.granularity == 0,
            f"granularity ({o.granularity}) must divide the FFN's width ({width})",
        ),
        (
            o.method != "granular" or o.granularity < 1 or o.num_experts % o.granularity == 0,
            f"num_experts ({o.num_experts}) must be a multiple of the granularity ({o.granularity})",
        ),
        (0 <= o.ratio <= 1, f"ratio ({o.ratio}) must be between 0 and 1"),
        (o.noise_std >= 0, f"noise_std ({o.noise_std}) must not be negative"),
        ((o.router_std or 0) >= 0, f"router_std ({o.router_std}) must not be negative"),
        (o.dtype is None or _output_dtype(o) is not None, f"dtype ({o.dtype}) must be float32, bfloat16 or float16"),
        (o.method != "shared" or form.shared is not None or form.parallel_mlp, f"{form.model_type} has no shared expert, which method shared needs"),
    ]  # fmt: skip
    problems = [text for ok, text in rules if not ok]
    problems += [
        f"allow ({a}) is none of {', '.join(ALLOWANCES)}" for a in o.allow if a not in ALLOWANCES
    ]
    if problems:
        raise OptionError("these options cannot be meant", problems=problems)


def _output_dtype(options: UpcycleOptions) -> str | None:
    by_name = {v: k for k, v in CONFIG_DTYPES.items() if k in FLOAT_DTYPES and k != "F64"}
    return by_name.get(options.dtype) if options.dtype else None


def _notes(form: Architecture, config: Mapping[str, Any], options: UpcycleOptions) -> Iterator[str]:
    moe = form.moe(config)
    yield "not trained after surgery"
    if options.method == "drop":
        yield "Drop-Upcycling overtakes copies only after long training (arXiv 2502.19261, figure 3)"
    if options.top_k == 1 and moe.routing.sums_to is not None:
        yield "with top_k = 1 and renormalised weights the router receives no gradient: train with top_k ≥ 2"
    if moe.expert_width % 8:
        yield (
            f"expert width {moe.expert_width} is no multiple of 8: transformers' grouped_mm and most engines "
            "refuse it in bf16"
        )
