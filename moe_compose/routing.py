"""The routing reference: from router logits to the chosen experts and their weights.

Plain torch, one function, every scheme that `Routing` can name. It is what all else is held to:
kernels have its signature and are compared with it, calibration weighs experts by its weights,
pruning is checked against it. It is itself compared with the router classes of transformers 5.23,
family by family, in `tests/test_routing.py`.

For one token, and logits z with one entry per expert:

    z = W_r x + b_r            b_r only with `logit_bias` (gpt-oss, 2508.10925); `router_logits`
    z = c·tanh(z / c)          `softcap`
    s = score(z)               softmax(z), sigmoid(z), sqrt(softplus(z)); z itself for `topk_*`
    S = top-k of s + b         `selection_bias` b, for choosing only (2408.15664); if the experts
                               are in groups, only those in the best groups are eligible
    g = s_S                    without b; here `topk_*` apply their function, over the k chosen
    g = g / (max(‖g‖, floor) + epsilon)     `renormalise`; ‖g‖ is Σg, or the p-norm (DBRX)
    g = g · scale · expert_scale_S          `routed_scaling_factor`; per expert in Gemma 4

Sources: METHODS section 1; Mixtral 2401.04088, OLMoE 2409.02060, DeepSeek-V2 2405.04434 (softmax,
groups by their maximum), DeepSeek-V3 2412.19437 (sigmoid, groups by their top 2), GRIN 2409.12136
(PhiMoE's sparsemixer).

Where it departs from transformers, on purpose:

- fp32 throughout (fp64 for fp64 logits). Several families round logits or weights to the
  checkpoint's dtype on the way.
- Ties go to the lower index, of experts and of groups; `torch.topk` promises no order.
- A scale that a family multiplies the summed expert outputs by (Laguna, Beam) is part of the
  weights: the same in mathematics.

Experts outside the best groups count as −inf, as in DeepSeek's own code and transformers 5.23.
Versions before its pull request 45441 gave them 0, which differs only where a negative correction
bias makes eligible scores negative: experts of rejected groups then beat them. DeepSeek-V2 still
has 0, and there it makes no difference, since softmax is never negative and has no bias.

Shape suffixes: T tokens, D model, E experts, K top-k, G groups, P experts per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_compose.architectures.routing_form import Routing
from moe_compose.errors import OptionError

#: PhiMoE's router always picks two, whatever its config says.
_SPARSEMIXER_PICKS = 2


class Routed(NamedTuple):
    """What a router decided.

    Attributes:
        weights_TK: what each chosen expert's output (or input, see `Routing.applied_to`) is
            multiplied by; fp32, or fp64.
        experts_TK: the chosen experts, best first; int64.
    """

    weights_TK: Tensor  # noqa: N815
    experts_TK: Tensor  # noqa: N815


def router_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """`z = W_r x + b_r` in fp32 (fp64 if `x_TD` is), whatever dtype the checkpoint has.

    Args:
        x_TD: what the router sees, `[T, D]`.
        weight_ED: the router's rows, `[E, D]`.
        bias_E: the router's bias `[E]`, where `Routing.logit_bias`.

    Returns:
        `[T, E]`.
    """
    x_TD = _widen(x_TD)
    bias_E = None if bias_E is None else bias_E.to(x_TD.dtype)
    return torch.nn.functional.linear(x_TD, weight_ED.to(x_TD.dtype), bias_E)


def route(
    logits_TE: Tensor,
    routing: Routing,
    top_k: int,
    *,
    correction_bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    chosen_TK: Tensor | None = None,
) -> Routed:
    """Choose `top_k` experts for every token and weigh them, as the module's formulas say.

    Differentiable in the logits, through the weights. `routing.applied_to` is left to the caller,
    and so is `hashed_layers`: it passes `chosen_TK` in those layers.

    Args:
        logits_TE: router logits `[T, E]`, the router's bias included.
        routing: the scheme.
        top_k: experts per token, K.
        correction_bias_E: `[E]`; required with `routing.selection_bias`, refused otherwise and
            where `chosen_TK` leaves nothing to choose.
        expert_scale_E: `[E]`; required with `routing.expert_scale`, refused otherwise.
        chosen_TK: experts chosen by something else, `[T, K]`, which the logits only weigh. In
            DeepSeek-V4's hash-routed layers it is `table_VK[token_ids_T]`.

    Returns:
        Weights and experts, `[T, K]` each.

    Raises:
        OptionError: sizes that don't fit one another, a tensor that the scheme lacks or has no use
            for; all faults at once.

    Example:
        >>> routed = route(torch.tensor([[0.0, 2.0, 1.0]]), Routing(score="topk_softmax"), 2)
        >>> routed.experts_TK                                    # [T=1, K=2]
        tensor([[1, 2]])
        >>> routed.weights_TK                                    # 1 / (1 + e^-1), 1 / (1 + e)
        tensor([[0.7311, 0.2689]])
    """
    problems = [
        *size_problems(logits_TE, routing, top_k),
        *tensor_problems(logits_TE, routing, top_k, correction_bias_E, expert_scale_E, chosen_TK),
    ]
    if problems:
        shape = list(logits_TE.shape)
        raise OptionError(
            f"cannot route logits of shape {shape} with top_k = {top_k}", problems=problems
        )
    logits_TE = _softcap(_widen(logits_TE), routing.softcap)
    if routing.score == "sparsemixer":
        weights_TK, experts_TK = _sparsemixer(logits_TE, routing.jitter)
    else:
        scores_TE = _scores(logits_TE, routing)
        if chosen_TK is None:
            experts_TK = _choose(scores_TE, routing, top_k, correction_bias_E)
        else:
            experts_TK = chosen_TK.long()
        weights_TK = _weigh(scores_TE.gather(-1, experts_TK), routing)
    weights_TK = weights_TK * routing.scale
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E.to(weights_TK.dtype)[experts_TK]
    return Routed(weights_TK, experts_TK)


def top_indices(values: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest along the last dimension, largest first, ties by lower index.

    `torch.topk` leaves the order of equal values open; a stable sort does not.

    Args:
        values: `[..., N]`.
        k: at most N.

    Returns:
        `[..., k]`, int64.
    """
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def _widen(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _softcap(logits_TE: Tensor, cap: float | None) -> Tensor:
    return torch.tanh(logits_TE / cap) * cap if cap else logits_TE


def _scores(logits_TE: Tensor, routing: Routing) -> Tensor:
    """What experts are compared by before any bias."""
    if routing.score == "softmax":
        return logits_TE.softmax(-1)
    if routing.score == "sigmoid":
        return logits_TE.sigmoid()
    if routing.score == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits_TE).sqrt()
    return logits_TE


def _choose(scores_TE: Tensor, routing: Routing, k: int, bias_E: Tensor | None) -> Tensor:
    """The top-k of the biased scores, in the best groups only."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
    if routing.grouped:
        choice_TE = _best_groups(choice_TE, routing)
    return top_indices(choice_TE, k)


def _best_groups(choice_TE: Tensor, routing: Routing) -> Tensor:
    """−inf for all experts outside the best groups. Expert e is in group e // P."""
    tokens, experts = choice_TE.shape
    choice_TGP = choice_TE.reshape(tokens, routing.groups, experts // routing.groups)
    if routing.group_score == "max":
        worth_TG = choice_TGP.amax(-1)
    else:
        worth_TG = choice_TGP.topk(2, dim=-1).values.sum(-1)
    best_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    best_TG.scatter_(-1, top_indices(worth_TG, routing.top_groups), True)
    return choice_TGP.masked_fill(~best_TG.unsqueeze(-1), -torch.inf).flatten(-2)


def _weigh(chosen_TK: Tensor, routing: Routing) -> Tensor:
    """Weights from the chosen experts' scores."""
    if routing.score == "topk_softmax":
        return chosen_TK.softmax(-1)
    if routing.score == "topk_sigmoid":
        chosen_TK = chosen_TK.sigmoid()
    if not routing.renormalise:
        return chosen_TK
    if routing.norm_p is None:
        norm_T1 = chosen_TK.sum(-1, keepdim=True)
    else:
        norm_T1 = torch.linalg.vector_norm(chosen_TK, ord=routing.norm_p, dim=-1, keepdim=True)
    return chosen_TK / (norm_T1.clamp(min=routing.floor) + routing.epsilon)


def _sparsemixer(logits_TE: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """PhiMoE's two picks, as in evaluation (2409.12136).

    Each is the largest logit m of those left, weighed by a softmax over the ones left that are
    close to it, `(m − z) / max(|z|, m) ≤ 2·jitter`. A pick without rivals weighs 1, so the weights
    sum to anything up to 2.
    """
    left_TE, weights, experts = logits_TE, [], []
    for _ in range(_SPARSEMIXER_PICKS):
        expert_T1 = top_indices(left_TE, 1)
        best_T1 = left_TE.gather(-1, expert_T1)
        far_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1) > 2 * jitter
        near_TE = left_TE.masked_fill(far_TE, -torch.inf).softmax(-1)
        weights.append(near_TE.gather(-1, expert_T1))
        experts.append(expert_T1)
        left_TE = left_TE.scatter(-1, expert_T1, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


def size_problems(logits_TE: Tensor, routing: Routing, top_k: int) -> Iterator[str]:
    """Counts that don't fit one another, in words."""
    if logits_TE.dim() != 2:
        yield "logits must be [tokens, experts]: flatten batch and sequence first"
        return
    experts, groups = logits_TE.shape[1], routing.groups
    if not 1 <= top_k <= experts:
        yield f"top_k ({top_k}) must lie in 1..{experts}, the number of experts: lower top_k"
    if routing.score == "sparsemixer":
        if top_k != _SPARSEMIXER_PICKS:
            yield f"sparsemixer always picks {_SPARSEMIXER_PICKS} (top_k = {top_k}): set top_k = 2"
        if routing.selection_bias or routing.grouped or routing.renormalise:
            yield "sparsemixer knows no correction bias, groups or renormalisation: leave them out"
    if not routing.grouped:
        return
    if experts % groups:
        yield f"{experts} experts don't divide into {groups} groups: keep a multiple of {groups}"
        return
    size = experts // groups
    if not 1 <= routing.top_groups <= groups:
        yield f"top_groups ({routing.top_groups}) must lie in 1..{groups}, the number of groups"
    elif top_k > routing.top_groups * size:
        eligible = f"{routing.top_groups} groups of {size} experts"
        yield f"top_k ({top_k}) exceeds what {eligible} hold: raise top_groups or lower top_k"
    if routing.group_score == "top2" and size < 2:
        yield f"a group's worth is the sum of its best 2, and groups have {size}: use fewer groups"


def tensor_problems(
    logits_TE: Tensor,
    routing: Routing,
    top_k: int,
    correction_bias_E: Tensor | None,
    expert_scale_E: Tensor | None,
    chosen_TK: Tensor | None,
) -> Iterator[str]:
    """Tensors that are missing, superfluous or of another shape, in words."""
    if logits_TE.dim() != 2:
        return
    experts = logits_TE.shape[1]
    chooses = chosen_TK is None
    for name, wanted, given in (
        ("correction_bias_E", routing.selection_bias and chooses, correction_bias_E),
        ("expert_scale_E", routing.expert_scale, expert_scale_E),
    ):
        if wanted and given is None:
            yield f"{name} is missing: pass the layer's tensor of shape [{experts}]"
        elif given is not None and not wanted:
            yield f"this router has no use for {name}: leave it out"
        elif given is not None and given.shape != (experts,):
            yield f"{name} must be [{experts}] (got {list(given.shape)}): reshape it"
    if chosen_TK is None:
        return
    if routing.score == "sparsemixer":
        yield "sparsemixer chooses by itself: leave chosen_TK out"
    wanted_shape = (logits_TE.shape[0], top_k)
    if chosen_TK.shape != wanted_shape:
        yield f"chosen_TK must be {list(wanted_shape)} (got {list(chosen_TK.shape)})"
    elif chosen_TK.numel() and not 0 <= int(chosen_TK.min()) <= int(chosen_TK.max()) < experts:
        low, high = int(chosen_TK.min()), int(chosen_TK.max())
        yield f"chosen_TK names experts {low}..{high}, and there are {experts}: renumber the table"
