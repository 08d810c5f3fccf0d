"""What can be asked of `upcycle`: the methods, the options, and which of them can be meant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import OptionError

if TYPE_CHECKING:
    from moe_compose.architectures import Architecture, Twin

Method = Literal["copy", "granular", "shared", "noise", "drop", "shuffle"]
RouterLaw = Literal["normal", "uniform", "zeros"]

#: Experts a layer: an order of magnitude above the largest models there are.
MOST_EXPERTS = 16_384

#: Methods whose experts may be narrower than the dense FFN.
FINER: tuple[Method, ...] = ("granular", "shared", "shuffle")


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A way to make experts out of an FFN.

    Attributes:
        summary: one line.
        paper: title and arXiv id.
        preserves: the preservation class that it aims at; the plan states the class that holds.
    """

    summary: str
    paper: str
    preserves: str


METHODS: Mapping[str, MethodInfo] = {
    "copy": MethodInfo(
        "every expert a copy of the FFN; computes what the dense model computes",
        "Sparse Upcycling, arXiv 2212.05055",
        "exact",
    ),
    "granular": MethodInfo(
        "finer experts of 1/G the width, in virtual groups of G that are chosen together; exact",
        "Upcycling LLMs into MoE, arXiv 2410.07524",
        "exact",
    ),
    "shared": MethodInfo(
        "the FFN becomes the shared expert, routed experts start silent; exact and diverse",
        "zero-initialised routed branch; shared experts: DeepSeekMoE, arXiv 2401.06066",
        "exact",
    ),
    "noise": MethodInfo(
        "copies, with Gaussian noise on a fraction of each expert's neurons",
        "random noise upcycling, as in arXiv 2502.19261 section 4",
        "approximate",
    ),
    "drop": MethodInfo(
        "copies, with a fraction of each expert's neurons redrawn; pays off after long training",
        "Drop-Upcycling, arXiv 2502.19261",
        "none",
    ),
    "shuffle": MethodInfo(
        "neurons shuffled, cut into finer experts, half of each redrawn; not function-preserving",
        "Qwen1.5-MoE and Qwen2, arXiv 2407.10671",
        "none",
    ),
}

#: What is refused unless asked for by name (`allow`): inexact variants of exact methods.
ALLOWANCES: Mapping[str, str] = {
    "unnormalised": "weights not renormalised (more portable for some): needs a small router",
    "independent-rows": "granular experts with a router row each, not one per group: never exact",
    "split-groups": "top_k that is no multiple of the granularity: the last group is cut",
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
    router_init: RouterLaw | None = None
    router_std: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    allow: tuple[str, ...] = ()


def check_options(
    options: UpcycleOptions,
    form: Architecture,
    twin: Twin,
    dense: Architecture,
    config: Mapping[str, Any],
) -> None:
    """Raise every fault of the options together.

    Args:
        options: of the upcycle.
        form: the target's form.
        twin: how source and target pair.
        dense: the source's form.
        config: the source's config.

    Raises:
        OptionError: at least one option, or combination, cannot be meant.
    """
    width = dense.width.integer(config)
    problems = [*_out_of_range(options), *_contradictions(options, form, twin, width)]
    if problems:
        raise OptionError("these options cannot be meant", problems=problems)


def _out_of_range(o: UpcycleOptions) -> Iterator[str]:
    if o.method not in METHODS:
        yield f"method ({o.method}) must be one of {', '.join(METHODS)}"
    if not 1 <= o.top_k <= o.num_experts:
        yield f"top_k ({o.top_k}) must be between 1 and num_experts ({o.num_experts})"
    if o.num_experts > MOST_EXPERTS:
        yield f"num_experts ({o.num_experts}) must be at most {MOST_EXPERTS}"
    if o.granularity < 1:
        yield f"granularity ({o.granularity}) must be at least 1"
    if not 0 <= o.ratio <= 1:
        yield f"ratio ({o.ratio}) must be between 0 and 1"
    if not 0 <= o.noise_std < math.inf:
        yield f"noise_std ({o.noise_std}) must be a finite number, 0 or more"
    if o.router_std is not None and not 0 <= o.router_std < math.inf:
        yield f"router_std ({o.router_std}) must be a finite number, 0 or more"
    if o.router_init not in (None, *get_args(RouterLaw)):
        yield f"router_init ({o.router_init}) must be one of {', '.join(get_args(RouterLaw))}"
    if o.dtype is not None and output_dtype(o) is None:
        yield f"dtype ({o.dtype}) must be float32, bfloat16 or float16"
    for name in o.allow:
        if name not in ALLOWANCES:
            yield f"allow ({name}) is none of {', '.join(ALLOWANCES)}"


def _contradictions(o: UpcycleOptions, form: Architecture, twin: Twin, width: int) -> Iterator[str]:
    if o.method == "granular" and o.granularity == 1:
        yield "method granular needs a granularity of 2 or more"
    if o.granularity > 1 and o.method not in FINER:
        names = ", ".join(FINER)
        yield f"granularity ({o.granularity}) has no meaning for method {o.method}; use {names}"
    if o.granularity > 1 and width % o.granularity:
        yield f"granularity ({o.granularity}) must divide the FFN's width ({width})"
    if o.granularity > 1 and o.method == "granular" and o.num_experts % o.granularity:
        yield (
            f"num_experts ({o.num_experts}) must be a multiple of the granularity ({o.granularity})"
        )
    for name in {"independent-rows", "split-groups"}.intersection(o.allow):
        if o.method != "granular":
            yield f"allow {name} has no meaning for method {o.method}"
    if "unnormalised" in o.allow and not twin.unnormalised_config:
        yield f"allow unnormalised has no meaning for {form.model_type}: its weights sum to 1"
    if o.method == "shared" and form.shared is None and not form.parallel_mlp:
        yield f"{form.model_type} has no shared expert, which method shared needs"


def output_dtype(options: UpcycleOptions) -> str | None:
    """The safetensors dtype to convert to; None keeps every tensor's own."""
    by_name = {v: k for k, v in FLOAT_DTYPES.items() if k != "F64"}
    return by_name.get(options.dtype) if options.dtype else None
