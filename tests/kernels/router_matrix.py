"""Runs the router's kernels in Triton's interpreter and writes every error as JSON; started by
`test_router.py` in a process of its own, as `interpreter_matrix.py` is.

    TRITON_INTERPRET=1 python router_matrix.py out.json

Shape suffixes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from tiny_models import TINY, tiny_config
from torch import Tensor

from moe_compose import routing as reference
from moe_compose.architectures import all_architectures
from moe_compose.architectures.routing_form import Routing, Score
from moe_compose.kernels import triton_router
from moe_compose.kernels.router import route

SCORES: tuple[Score, ...] = get_args(Score)
SIZES = (1, 5, 60, 64, 130, 256, 384)
#: E, groups, top_groups.
GROUPS = ((60, 4, 2), (64, 8, 4), (256, 8, 4), (384, 12, 5), (130, 13, 3), (6, 3, 1), (60, 20, 7))
#: What a scheme may add to its score, one after another.
ADDED: tuple[dict[str, Any], ...] = (
    {"renormalise": True},
    {"selection_bias": True, "scale": 2.5},
    {"renormalise": True, "epsilon": 1e-3, "softcap": 2.0},
    {"renormalise": True, "norm_p": 2.0, "selection_bias": True},
    {"expert_scale": True, "scale": 0.5},
    {"renormalise": True, "norm_p": 1.0, "floor": 0.6},
    {"renormalise": True, "norm_p": 3.0, "expert_scale": True},
    {"softcap": 5.0},
    {"renormalise": True, "epsilon": 1e-20, "selection_bias": True, "expert_scale": True},
)
ALONE = ({}, {"softcap": 4.0}, {"scale": 1.7, "jitter": 0.2}, {"expert_scale": True, "jitter": 0.1})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the router; `logits` says what they are."""

    routing: Routing
    experts: int = 12
    top_k: int = 3
    tokens: int = 6
    logits: str = "random"
    given: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of `route`."""

    logits: Tensor
    routing: Routing
    top_k: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def with_logits(self, logits: Tensor) -> Call:
        return replace(self, logits=logits)

    def run(self, function: Any = reference.route, **options: Any) -> reference.Routed:
        return function(self.logits, self.routing, self.top_k, **self.tensors, **options)


def cases() -> dict[str, Case]:
    """Every score at every size, with what it may add in turn; then groups, ties, odd numbers."""
    found = {}
    for i, (experts, score) in enumerate(itertools.product(SIZES, SCORES)):
        if score == "sparsemixer" and experts == 1:
            continue
        choices = ALONE if score == "sparsemixer" else ADDED
        added = choices[(i // 6 + i) % len(choices)]
        top_k = 2 if score == "sparsemixer" else min((8, 1, 3, experts, 5)[i % 5], experts, 70)
        found[f"{score} {experts=} {top_k=}"] = Case(
            routing=Routing(score=score, **added),
            experts=experts,
            top_k=top_k,
            tokens=6 if experts < 100 else 3,
        )
    for i, ((experts, groups, top_groups), worth) in enumerate(
        itertools.product(GROUPS, ("max", "top2", "none"))
    ):
        routing = Routing(
            score=("sigmoid", "softmax", "sqrtsoftplus", "topk_sigmoid")[i % 4],
            renormalise=i % 3 == 0,
            selection_bias=i % 2 == 0,
            groups=groups,
            top_groups=top_groups,
            group_score=worth,
        )
        top_k = min(8, experts // groups * top_groups)
        if experts > 100 and worth != ("max", "top2")[i // 3 % 2]:
            continue
        for logits in ("random", "tied") if experts < 100 else ("tied",):
            found[f"{experts=} {groups=} {worth} {logits}"] = Case(
                routing=routing, experts=experts, top_k=top_k, logits=logits, tokens=4
            )
    for score in SCORES:
        routing = Routing(score=score)
        for logits in ("tied", "equal", "-inf", "NaN", "strided", "one token"):
            tokens = 1 if logits == "one token" else 6
            top_k = 2 if score == "sparsemixer" or logits == "-inf" else 5
            found[f"{score} {logits}"] = Case(
                routing=routing, tokens=tokens, logits=logits, top_k=top_k
            )
        if score != "sparsemixer":
            renormalised = Routing(score=score, renormalise=True, selection_bias=True, scale=2.0)
            found[f"{score} given"] = Case(routing=renormalised, given=True)
            found[f"{score} all but one -inf"] = Case(
                routing=routing, logits="all but one -inf", top_k=4
            )
    return found | {
        "no token": Case(routing=Routing(score="softmax"), tokens=0),
        "many programs": Case(routing=Routing(score="softmax"), experts=64, tokens=50, top_k=4),
        "grouped, -inf": Case(
            routing=Routing(score="topk_sigmoid", groups=4, top_groups=2),
            logits="all but one -inf",
            top_k=6,
        ),
    }


def logits_of(case: Case, generator: torch.Generator) -> Tensor:
    """Multiples of 2^-8: what is not tied is apart by more than rounding."""
    shape = (case.tokens, case.experts)
    drawn = torch.randn(shape, generator=generator).mul(2**8).round() / 2**8
    match case.logits:
        case "tied":
            return drawn.round().clamp(-1, 1)
        case "equal":
            return torch.zeros(shape)
        case "-inf":
            drawn[:, ::2], drawn[::2, 1] = -torch.inf, -torch.inf
        case "all but one -inf":
            drawn[:, : case.experts // 2] = drawn[:, case.experts // 2 + 1 :] = -torch.inf
        case "NaN":
            drawn[::2, 3] = torch.nan
        case "strided":
            return drawn.T.contiguous().T
    return drawn


def build(case: Case, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    logits_TE, tensors = logits_of(case, generator), {}
    if case.routing.selection_bias and not case.given:
        tensors["correction_bias_E"] = torch.rand(case.experts, generator=generator) * 1.6 - 1.2
    if case.routing.expert_scale:
        tensors["expert_scale_E"] = 0.5 + torch.rand(case.experts, generator=generator)
    if case.given:  # an expert may come twice
        shape = (case.tokens, case.top_k)
        tensors["chosen_TK"] = torch.randint(case.experts, shape, generator=generator)
    return Call(logits=logits_TE, routing=case.routing, top_k=case.top_k, tensors=tensors)


def gap(ours: reference.Routed, exact: reference.Routed) -> float:
    """The largest relative error of a weight; infinite if experts differ, or what is a number."""
    weights_TK, exact_TK = ours.weights_TK.double(), exact.weights_TK.double()
    same = torch.equal(ours.experts_TK, exact.experts_TK)
    if not same or not torch.equal(weights_TK.isnan(), exact_TK.isnan()):
        return float("inf")
    off = ((weights_TK - exact_TK) / torch.where(exact_TK == 0, 1.0, exact_TK)).nan_to_num()
    return float(off.abs().max()) if off.numel() else 0.0


def with_gradient(
    call: Call, function: Any = reference.route, **options: Any
) -> tuple[reference.Routed, Tensor]:
    """The result, and the gradient of a fixed weighing of the weights."""
    call = call.with_logits(call.logits.clone().requires_grad_())
    routed = call.run(function, **options)
    torch.manual_seed(0)
    loss = routed.weights_TK * torch.randn(routed.weights_TK.shape).to(routed.weights_TK.dtype)
    loss.sum().backward()
    assert call.logits.grad is not None
    detached = reference.Routed(routed.weights_TK.detach(), routed.experts_TK)
    return detached, call.logits.grad.double()


def error(ours: Tensor, exact: Tensor, terms: float = 0.0) -> float:
    """In the 2-norm, relative to `exact`, or to the `terms` that it is the difference of."""
    if not torch.equal(ours.isnan(), exact.isnan()):
        return float("inf")
    size = max(float(exact.nan_to_num().norm()), terms)
    return float((ours - exact).nan_to_num().norm()) / (size or 1.0)


def errors(call: Call) -> dict[str, float]:
    ours, our_gradient = with_gradient(call, route, implementation="triton")
    exact, gradient = with_gradient(call.with_logits(call.logits.double()))
    # Of sqrt(softplus) at −inf autograd makes 0·∞; it is 0.
    gradient = torch.where(call.logits == -torch.inf, 0.0, gradient)
    return {
        "experts": torch.equal(ours.experts_TK, call.run().experts_TK),
        "weights": gap(ours, exact),
        "gradient": error(our_gradient, gradient, float(exact.weights_TK.nan_to_num().norm())),
    }


def families() -> dict[str, dict[str, float]]:
    """The scheme of every family, as its form reads its tiny config; each scheme once."""
    forms = {name: form.routing for name, form in all_architectures().items() if name in TINY}
    schemes = {
        name: form.resolve(tiny_config(name).to_dict()) for name, form in forms.items() if form
    }
    found = {
        scheme: errors(build(Case(routing=scheme, experts=16, top_k=picks(scheme, 4)), i))
        for i, scheme in enumerate(dict.fromkeys(schemes.values()))
    }
    return {name: found[scheme] for name, scheme in schemes.items()}


def picks(routing: Routing, others: int) -> int:
    return 2 if routing.score == "sparsemixer" else others


def saturated() -> bool:
    """Scores that fp32 cannot tell apart are ties."""
    logits_TE = 40 + torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    call = Call(logits=logits_TE, routing=Routing(score="sigmoid"), top_k=5)
    return bool(gap(call.run(route, implementation="triton"), call.run()) <= 2e-6)


@triton.jit
def last_of_largest(keys, columns):
    largest = tl.max(keys, 1)
    return tl.max(tl.where(keys == largest[:, None], columns[None, :], -1), 1)


def controls() -> dict[str, float]:
    """What faulty routers differ by: all must be noticed."""
    biased = Routing(score="topk_sigmoid", renormalise=True, selection_bias=True, scale=2.0)
    grouped = Routing(score="sigmoid", renormalise=True, groups=4, top_groups=2, softcap=2.0)
    call = build(Case(routing=biased), 0)
    bias_E = call.tensors["correction_bias_E"]
    in_groups = build(Case(routing=grouped, experts=16, top_k=4), 1)
    exact = call.run().weights_TK

    def fault(of: Call, **changes: Any) -> float:
        faulty = replace(of, routing=replace(of.routing, **changes))
        return gap(faulty.run(route, implementation="triton"), of.run())

    unbiased = replace(biased, selection_bias=False)
    weighed = Call(logits=call.logits + bias_E, routing=unbiased, top_k=3)
    routed = weighed.run(route, implementation="triton")
    assert torch.equal(routed.experts_TK, call.run().experts_TK)
    found = {
        "bias used in weights": float((routed.weights_TK / exact - 1).abs().max()),
        "renormalise forgotten": fault(call, renormalise=False),
        "scale forgotten": fault(call, scale=1.0),
        "another norm": fault(call, norm_p=2.0),
        "groups forgotten": fault(in_groups, groups=1),
        "another worth of groups": fault(in_groups, group_score="max"),
        "softcap forgotten": fault(in_groups, softcap=None),
        "gradient without the sum's": error(
            with_gradient(replace(call, routing=replace(biased, renormalise=False)))[1],
            with_gradient(call, route, implementation="triton")[1],
        ),
    }
    tied = build(Case(routing=Routing(score="softmax"), logits="tied"), 2)
    sound, triton_router.first_of_largest = triton_router.first_of_largest, last_of_largest
    found["ties by higher index"] = fault(tied)
    triton_router.first_of_largest = sound
    return found | {"no fault": fault(tied)}


def main(path: str) -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN and −inf
    torch.set_num_threads(1)
    result = {
        "cases": {name: errors(build(c, i)) for i, (name, c) in enumerate(cases().items())},
        "families": families(),
        "saturated": saturated(),
        "controls": controls(),
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
