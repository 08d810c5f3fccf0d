"""How exact an upcycle is, from the routing and the method alone; and the factor on the experts
that makes it so.

The k experts of a token together give `Σ g_e · f_e(x)`. When all chosen experts compute the same
`f`, that is `f · Σ g_e`, so everything hangs on what the weights sum to. With granularity G each
expert holds 1/G of the neurons and a token sees every neuron k/G times with weight `1/k` each, so
the sum is short of a factor G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import Architecture, Twin
from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.plan import Preservation, Rounding

if TYPE_CHECKING:
    from moe_compose.surgery.upcycle_options import UpcycleOptions


#: Largest noise, in units of a matrix's own deviation, that still counts as approximate.
SMALL_NOISE = 0.05

#: Largest router deviation under which weights that are not renormalised stay near uniform.
SMALL_ROUTER_STD = 0.002

#: What `approximate` is held to: mean KL to the source, in nats per token.
APPROXIMATE_KL = 0.1


def output_factor(form: Architecture, config: Mapping[str, Any], options: UpcycleOptions) -> float:
    """What the product of an expert's up and down must be multiplied by for the mixture to give the
    FFN's output.

    `G / Σg` where the weights sum to a constant; `E·G/k / scale` where a softmax over all E is cut
    to k and a small router leaves it near uniform (arXiv 2410.07524, section 3.2).
    """
    moe = form.moe(config)
    total = moe.routing.sums_to
    if total is not None:
        return options.granularity / total
    return options.num_experts * options.granularity / (options.top_k * moe.routing.scale)


def default_router_std(
    form: Architecture, config: Mapping[str, Any], options: UpcycleOptions
) -> float:
    """0.02; 0.002 where experts speak with weights that do not sum to 1, to stay near uniform."""
    constant = form.moe(config).routing.sums_to is not None
    return 0.02 if constant or options.method == "shared" else SMALL_ROUTER_STD


def classify(
    form: Architecture,
    config: Mapping[str, Any],
    twin: Twin,
    options: UpcycleOptions,
    source_dtype: str,
) -> Preservation:
    """The preservation class of an upcycle (METHODS, section 2.3).

    Args:
        form: the target's form.
        config: the target's config.
        twin: how source and target pair.
        options: of the upcycle.
        source_dtype: safetensors dtype of the source's FFNs.

    Raises:
        UnsupportedError: not exact although the method promises it, and not allowed by name.
    """
    if form.parallel_mlp and options.method != "shared":
        raise UnsupportedError(
            f"{form.model_type} keeps the dense FFN beside its experts: experts made from it, as "
            f"--method {options.method} starts them, would add it twice",
            hint="Use --method shared: the FFN stays, and the experts add nothing at first.",
        )
    rounding = _rounding(form, config, options, source_dtype)
    if options.method == "shared":
        why = "the FFN is the shared expert and the routed experts add nothing yet (down = 0)"
        return Preservation("exact", why, twin.accuracy, rounding)
    if options.method in ("drop", "shuffle"):
        return Preservation(
            "none",
            f"{options.ratio:.0%} of each expert's neurons are redrawn; expect a higher loss",
        )
    problems = _inexact(form, config, options)
    refused = [
        f"{why} (--allow {name})" for name, why in problems.items() if name not in options.allow
    ]
    if refused:
        raise UnsupportedError(
            f"{options.method} would not be exact here",
            problems=refused,
            hint="Allow it by name if that is what you want.",
        )
    why = "equal experts under weights that sum to 1"
    if options.granularity > 1:
        why = f"whole virtual groups of {options.granularity} are chosen; up and down × √G"
    if not problems and options.method != "noise":
        return Preservation("exact", why, twin.accuracy, rounding)
    return _changed(problems, options)


def _changed(problems: Mapping[str, str], options: UpcycleOptions) -> Preservation:
    """Approximate while what is inexact is small, by the figures METHODS 2.3 and 2.4 give."""
    changes, small = [*problems.values()], set(problems) <= {"unnormalised"}
    if options.method == "noise":
        share = f"{options.ratio:.0%} of each expert's neurons"
        changes.append(f"noise of {options.noise_std:g}·σ on {share}")
        small = small and options.noise_std <= SMALL_NOISE
    if "unnormalised" in problems and options.router_std is not None:
        small = small and options.router_std <= SMALL_ROUTER_STD
    if small:
        return Preservation("approximate", "; ".join(changes), APPROXIMATE_KL)
    return Preservation("none", "; ".join(changes))


def _rounding(
    form: Architecture, config: Mapping[str, Any], options: UpcycleOptions, source_dtype: str
) -> Rounding | None:
    """How weights are rounded, if they are: by a 16-bit `dtype`, or by factors like √2 in one.

    Powers of two round nothing.
    """
    own = FLOAT_DTYPES.get(source_dtype)
    stored = options.dtype or own
    if stored not in ("bfloat16", "float16"):
        return None
    up, down = 1.0, 1.0
    if options.method != "shared":
        up, down = split_factor(output_factor(form, config, options), options.granularity)
    if stored == own and all(math.frexp(f)[0] == 0.5 for f in (up, down)):
        return None
    return Rounding(stored, everything=options.dtype is not None, up=up, down=down)


def _inexact(
    form: Architecture, config: Mapping[str, Any], options: UpcycleOptions
) -> dict[str, str]:
    routing, found = form.moe(config).routing, {}
    if routing.sums_to is None:
        if routing.score != "softmax":
            raise UnsupportedError(
                f"the routing of {form.model_type} ({routing.describe()}) gives weights whose sum "
                "depends on the router: no copy of an FFN is exact under it",
                hint="Choose another --target, or --method shared where there are shared experts.",
            )
        found["unnormalised"] = (
            "weights are not renormalised; outputs are scaled by E·G/k = "
            f"{output_factor(form, config, options):g}, right for a uniform router only"
        )
    if options.granularity > 1:
        if options.top_k % options.granularity:
            found["split-groups"] = (
                f"top_k ({options.top_k}) is no multiple of the granularity "
                f"({options.granularity}), so the last virtual group is cut"
            )
        if "independent-rows" in options.allow:
            found["independent-rows"] = "each granular expert has a router row of its own"
    return found


def split_factor(factor: float, granularity: int) -> tuple[float, float]:
    """The factor's share on up and on down: all on down for whole experts, `√` on each for granular
    ones.
    """
    return (1.0, factor) if granularity == 1 else (math.sqrt(factor), math.sqrt(factor))
