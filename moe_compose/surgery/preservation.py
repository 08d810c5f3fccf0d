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
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.plan import Preservation

if TYPE_CHECKING:
    from moe_compose.surgery.upcycle import UpcycleOptions


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


def default_router_std(form: Architecture, config: Mapping[str, Any]) -> float:
    """0.02; 0.002 where the weights do not sum to 1, so that they stay near uniform."""
    return 0.02 if form.moe(config).routing.sums_to is not None else 0.002


def classify(
    form: Architecture, config: Mapping[str, Any], twin: Twin, options: UpcycleOptions
) -> Preservation:
    """The preservation class of an upcycle (METHODS, section 2.3).

    Raises:
        UnsupportedError: not exact although the method promises it, and not allowed by name.
    """
    if options.method == "shared":
        return Preservation(
            "exact",
            "the FFN is the shared expert and the routed experts add nothing yet (down = 0)",
            twin.accuracy,
        )
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
    if problems:
        kind = "approximate" if set(problems) == {"unnormalised"} else "none"
        return Preservation(kind, "; ".join(problems.values()))
    if options.method == "noise":
        return Preservation(
            "approximate",
            f"noise of {options.noise_std:g}·σ on {options.ratio:.0%} of each expert's neurons",
        )
    why = "equal experts under weights that sum to 1"
    if options.granularity > 1:
        why = f"whole virtual groups of {options.granularity} experts are chosen, scaled by √G on up and down"
    return Preservation("exact", why, twin.accuracy)


def _inexact(
    form: Architecture, config: Mapping[str, Any], options: UpcycleOptions
) -> dict[str, str]:
    routing, found = form.moe(config).routing, {}
    if routing.sums_to is None:
        if routing.score != "softmax":
            raise UnsupportedError(
                f"the routing of {form.model_type} ({routing.describe()}) gives weights whose sum depends on the "
                "router: no copy of an FFN is exact under it",
                hint="Choose another --target, or --method shared where the family has shared experts.",
            )
        found["unnormalised"] = (
            f"weights are not renormalised; outputs are scaled by E·G/k = "
            f"{output_factor(form, config, options):g}, right for a uniform router only"
        )
    if options.granularity > 1:
        if options.top_k % options.granularity:
            found["split-groups"] = (
                f"top_k ({options.top_k}) is no multiple of the granularity ({options.granularity}), "
                "so the last virtual group is cut"
            )
        if "independent-rows" in options.allow:
            found["independent-rows"] = "each granular expert has a router row of its own"
    return found


def split_factor(factor: float, granularity: int) -> tuple[float, float]:
    """The factor's share on up and on down: all on down for whole experts, `√` on each for granular
    ones.
    """
    return (1.0, factor) if granularity == 1 else (math.sqrt(factor), math.sqrt(factor))
