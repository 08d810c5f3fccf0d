"""How a family routes: `RoutingForm` names the config entries that decide it, `Routing` is what one
config makes of them. The formulas are in `moe_compose.routing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from moe_compose.architectures.base import Key

#: How logits become the scores by which experts are chosen and weighted. See `moe_compose.routing`
#: for the formulas.
Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "topk_softmax", "topk_sigmoid", "sparsemixer"]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How one router turns logits into experts and weights; the schemes of `moe_compose.routing`.

    Attributes:
        score: `softmax`, `sigmoid`, `sqrtsoftplus` over all experts and then top-k; `topk_softmax`,
            `topk_sigmoid`: top-k of the logits, then the function over the chosen; `sparsemixer`:
            PhiMoE's masked softmax per pick.
        renormalise: the k weights are divided by their sum, or by their `norm_p`-norm.
        epsilon: added to that sum (1e-20 in DeepSeek-V3, 1e-6 in LFM2).
        floor: lower bound of that sum (ERNIE's `moe_norm_min`).
        norm_p: order of the norm that `renormalise` divides by (DBRX); None where it is the sum.
        scale: `routed_scaling_factor`, after renormalisation.
        logit_bias: a bias is part of the logits (gpt-oss).
        selection_bias: a correction bias is added for choosing, not for weighting: to the scores,
            or to the logits where the top-k is of the logits (kolibri).
        groups, top_groups: experts are in `groups` equal groups, of which the best `top_groups`
            stay eligible.
        group_score: a group's worth: its `max`, or the sum of its `top2`; `none`: groups are
            ignored (DeepSeek-V2's `greedy`).
        softcap: logits become `cap·tanh(logits/cap)` first; not with None or 0.
        jitter: how close to the best a logit must be to share its softmax (`sparsemixer`; PhiMoE's
            `router_jitter_noise`).
        expert_scale: the weights are multiplied by a learned scale per expert (Gemma 4).
        applied_to: the weight multiplies the expert's `output`, or its `input` (Llama 4).
        hashed_layers: so many first layers route by a table of token ids (DeepSeek-V4).
    """

    score: Score
    renormalise: bool = False
    epsilon: float = 0.0
    floor: float = 0.0
    norm_p: float | None = None
    scale: float = 1.0
    logit_bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2", "none"] = "top2"
    softcap: float | None = None
    jitter: float = 0.01
    expert_scale: bool = False
    applied_to: Literal["output", "input"] = "output"
    hashed_layers: int = 0

    @property
    def grouped(self) -> bool:
        """Whether groups of experts are chosen before experts."""
        return self.groups > 1 and self.group_score != "none"

    @property
    def sums_to(self) -> float | None:
        """What the k weights sum to for every token (up to `epsilon`); None when that depends on
        the router.
        """
        if self.score == "topk_softmax" or (self.renormalise and self.norm_p in (None, 1, 1.0)):
            return None if self.expert_scale else self.scale
        return None

    def describe(self) -> str:
        """One line in words, as `inspect` shows it."""
        words = {
            "softmax": "softmax over all experts, then top-k",
            "sigmoid": "sigmoid per expert, then top-k",
            "sqrtsoftplus": "sqrt(softplus) per expert, then top-k",
            "topk_softmax": "top-k of the logits, then softmax over the k",
            "topk_sigmoid": "top-k of the logits, then sigmoid",
            "sparsemixer": "sparsemixer (a masked softmax per pick)",
        }
        said = [words[self.score]]
        if self.logit_bias:
            said.append("router bias in the logits")
        if self.selection_bias:
            said.append("correction bias for choosing only")
        if self.grouped:
            said.append(f"best {self.top_groups} of {self.groups} groups first")
        if self.score != "topk_softmax":
            said.append("weights renormalised" if self.renormalise else "weights not renormalised")
        if self.scale != 1.0:
            said.append(f"times {self.scale:g}")
        if self.applied_to == "input":
            said.append("applied to the expert's input")
        return ", ".join(said)


@dataclass(frozen=True, kw_only=True)
class RoutingForm:
    """`Routing` with config keys in place of the values that a config decides."""

    score: Score | Key
    renormalise: bool | Key = False
    epsilon: float | Key = 0.0
    floor: float | Key = 0.0
    norm_p: float | Key | None = None
    scale: float | Key = 1.0
    logit_bias: bool | Key = False
    selection_bias: bool | Key = False
    groups: int | Key = 1
    top_groups: int | Key = 1
    group_score: Literal["max", "top2", "none"] | Key = "top2"
    softcap: float | Key | None = None
    jitter: float | Key = 0.01
    expert_scale: bool = False
    applied_to: Literal["output", "input"] = "output"
    hashed_layers: int | Key = 0

    def resolve(self, config: Mapping[str, Any]) -> Routing:
        """The routing that `config` asks for.

        Raises:
            CheckpointError: an entry is missing or has a value the form does not know.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Routing(**{n: v.get(config) if isinstance(v, Key) else v for n, v in values.items()})
