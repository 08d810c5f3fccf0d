"""The routing reference against transformers' own routers, closed forms, and its own laws.

    pytest tests/test_routing.py

Every family's router class is built on its own, from a tiny config of its family, with random
weights, random correction biases (some so negative that biased scores are), and factors that are
not 1. Chosen sets must be equal and weights agree to 1e-6. Each family has broken schemes beside
its own (a forgotten renormalisation, a wrong order, a missing scale, ...), which must all be
noticed: a comparison that accepts them would prove nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig

from moe_compose.architectures import all_architectures
from moe_compose.architectures.routing_form import Routing, Score
from moe_compose.errors import OptionError
from moe_compose.routing import Routed, route, router_logits, top_indices

T, D, E, K = 96, 64, 16, 4

SOFTMAX = Routing(score="softmax")
RENORMALISED = Routing(score="softmax", renormalise=True)
TOPK_SOFTMAX = Routing(score="topk_softmax")
SIGMOID = Routing(score="sigmoid", renormalise=True)
BIASED = Routing(score="sigmoid", renormalise=True, selection_bias=True)
GROUPED = Routing(
    score="sigmoid",
    renormalise=True,
    epsilon=1e-20,
    scale=1.7,
    selection_bias=True,
    groups=4,
    top_groups=2,
)

LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
NAMED = {"num_experts": E, "num_experts_per_tok": K}
ROUTED = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}

NO_RENORMALISATION = {"renormalise": False}
NO_BIAS = {"selection_bias": False}
NO_SCALE = {"scale": 1.0}
NO_GROUPS = {"groups": 1}


@dataclass(frozen=True)
class Family:
    """A router class, the config it is built from, the scheme it has, and schemes it has not.

    `router` is `module.Class`, `broken` are changes of the scheme. `model_type` chooses the config
    class where the module's name does not; `variant` tells apart several schemes of one family;
    `bias_given`: the router takes its correction bias as an argument.
    """

    router: str
    config: Mapping[str, Any]
    routing: Routing
    broken: tuple[Mapping[str, Any], ...]
    variant: str = ""
    model_type: str = ""
    top_k: int = K
    bias_given: bool = False

    @property
    def type(self) -> str:
        return self.model_type or self.router.split(".")[0]

    def __str__(self) -> str:
        return f"{self.type} {self.variant}".strip()


def softmax_families() -> list[Family]:
    """Softmax over all experts, then top-k, renormalised as the config says or always."""
    wrong_order = {"score": "topk_softmax"}
    hunyuan = {"num_experts": E, "moe_topk": K}
    always = (NO_RENORMALISATION, {"score": "sigmoid"})
    families = [
        Family("jamba.JambaTopKRouter", NAMED, SOFTMAX, (wrong_order,)),
        Family("mixtral.MixtralTopKRouter", LOCAL, RENORMALISED, always),
        Family("minimax.MiniMaxTopKRouter", LOCAL, RENORMALISED, always),
        Family("hunyuan_v1_moe.HunYuanMoEV1Gate", hunyuan, RENORMALISED, always),
    ]
    for router, model_type in (
        ("qwen3_5_moe.Qwen3_5MoeTopKRouter", "qwen3_5_moe_text"),
        ("qwen3_vl_moe.Qwen3VLMoeTextTopKRouter", "qwen3_vl_moe_text"),
    ):
        families.append(Family(router, NAMED, RENORMALISED, always, model_type=model_type))
    for router in (
        "qwen2_moe.Qwen2MoeTopKRouter",
        "qwen3_moe.Qwen3MoeTopKRouter",
        "qwen3_next.Qwen3NextTopKRouter",
        "olmoe.OlmoeTopKRouter",
        "flex_olmo.FlexOlmoTopKRouter",
        "mellum.MellumTopKRouter",
    ):
        config = {**NAMED, "norm_topk_prob": True}
        families.append(Family(router, config, RENORMALISED, (NO_RENORMALISATION,)))
        config, broken = {**NAMED, "norm_topk_prob": False}, ({"renormalise": True}, wrong_order)
        families.append(Family(router, config, SOFTMAX, broken, "as is"))
    return families


def topk_softmax_families() -> list[Family]:
    """Top-k of the logits, then softmax over the k."""
    broken = ({"score": "softmax"}, {"score": "topk_sigmoid"}, {"scale": 1.1})
    biased = replace(TOPK_SOFTMAX, logit_bias=True)
    aria = {"moe_num_experts": E, "moe_topk": K}
    cohere = {**NAMED, "expert_selection_fn": "softmax"}
    privacy_filter = "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter"
    return [
        Family("gpt_oss.GptOssTopKRouter", LOCAL, biased, broken),
        Family(privacy_filter, LOCAL, replace(biased, scale=1 / K), broken),
        Family("granitemoe.GraniteMoeTopKRouter", LOCAL, TOPK_SOFTMAX, broken),
        Family("granitemoeshared.GraniteMoeSharedTopKRouter", LOCAL, TOPK_SOFTMAX, broken),
        Family("granitemoehybrid.GraniteMoeHybridTopKRouter", LOCAL, TOPK_SOFTMAX, broken),
        Family("granitemoe_swa.GraniteMoeSWATopKRouter", LOCAL, TOPK_SOFTMAX, broken),
        Family("aria.AriaTextTopKRouter", aria, TOPK_SOFTMAX, broken, model_type="aria_text"),
        Family("cohere2_moe.Cohere2MoeTopKRouter", cohere, TOPK_SOFTMAX, broken),
    ]


def grouped_families() -> list[Family]:
    """DeepSeek-V3's router in all the families that have it, with and without renormalisation."""
    broken = (
        *(NO_BIAS, NO_GROUPS, {"group_score": "max"}, {"top_groups": 1}),
        *({"score": "softmax"}, {"scale": 1.2}),
    )
    families = []
    for router in (
        "deepseek_v3.DeepseekV3TopkRouter",
        "deepseek_v32.DeepseekV32TopkRouter",
        "glm4_moe.Glm4MoeTopkRouter",
        "glm4_moe_lite.Glm4MoeLiteTopkRouter",
        "glm_moe_dsa.GlmMoeDsaTopkRouter",
        "dots1.Dots1TopkRouter",
        "solar_open.SolarOpenTopkRouter",
        "mimo_v2_flash.MiMoV2FlashTopkRouter",
        "nemotron_h.NemotronHTopkRouter",
        "axk1.AXK1TopkRouter",
        "exaone_moe.ExaoneMoeTopkRouter",
        "bailing_hybrid.BailingHybridTopkRouter",
        "kimi_linear.KimiLinearTopkRouter",
        "beam.BeamTopKRouter",
    ):
        config: dict[str, Any] = {**ROUTED, "norm_topk_prob": True}
        if router.startswith(("exaone_moe", "bailing_hybrid", "kimi_linear", "beam")):
            config["num_experts"] = config.pop("n_routed_experts")
        scheme = GROUPED
        if router.startswith("beam"):  # scales later: see `test_scale_after_the_experts`
            config["routed_scaling_factor"] = 1.0
            scheme = replace(GROUPED, scale=1.0)
        families.append(Family(router, config, scheme, (*broken, NO_RENORMALISATION)))
        config, scheme = {**config, "norm_topk_prob": False}, replace(scheme, renormalise=False)
        changes = (*broken, {"renormalise": True})
        families.append(Family(router, config, scheme, changes, "as is"))
    return families


def softmax_variants() -> list[Family]:
    """Softmax with scales, groups, biases or a floor."""
    v2 = replace(SOFTMAX, scale=1.7, groups=4, top_groups=2)
    mistral = replace(RENORMALISED, epsilon=1e-20, scale=1.7, groups=4, top_groups=2)
    mistral_broken = (NO_RENORMALISATION, NO_SCALE, NO_GROUPS, {"group_score": "max"})
    return [
        Family(
            "deepseek_v2.DeepseekV2TopkRouter",
            {**ROUTED, "topk_method": "greedy"},
            replace(v2, group_score="none"),
            ({"group_score": "max"}, NO_SCALE, {"renormalise": True}),
        ),
        Family(
            "deepseek_v2.DeepseekV2TopkRouter",
            {**ROUTED, "topk_method": "group_limited_greedy", "norm_topk_prob": True},
            replace(v2, group_score="max"),
            ({"group_score": "top2"}, NO_GROUPS, NO_SCALE, {"renormalise": True}),
            "in groups",
        ),
        Family(
            "mistral4.Mistral4TopkRouter",
            {**ROUTED, "norm_topk_prob": True},
            mistral,
            mistral_broken,
        ),
        Family(
            "mistral_large4.MistralLarge4TextTopkRouter",
            ROUTED,
            mistral,
            mistral_broken,
            model_type="mistral_large4_text",
        ),
        Family(
            "ernie4_5_moe.Ernie4_5_MoeTopKRouter",
            {"moe_num_experts": E, "moe_k": K, "moe_norm_min": 0.6},
            replace(RENORMALISED, floor=0.6, selection_bias=True),
            (NO_BIAS, NO_RENORMALISATION, {"floor": 0.0}),
        ),
        Family(
            "longcat_flash.LongcatFlashTopkRouter",
            {"n_routed_experts": E - 4, "zero_expert_num": 4, "moe_topk": K}
            | {"routed_scaling_factor": 1.7},
            replace(SOFTMAX, scale=1.7, selection_bias=True),
            (NO_BIAS, NO_SCALE, {"renormalise": True}),
        ),
        Family(
            "phimoe.PhimoeTopKRouter",
            {"num_local_experts": E, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
            Routing(score="sparsemixer", jitter=0.1),
            ({"jitter": 0.01}, {"jitter": 0.2}, {"score": "softmax"}, {"score": "topk_softmax"}),
            top_k=2,
        ),
    ]


def sigmoid_variants() -> list[Family]:
    """Sigmoid per expert, all over or over the chosen, and DeepSeek-V4's sqrt(softplus)."""
    v4 = replace(BIASED, score="sqrtsoftplus", epsilon=1e-20, scale=1.7)
    scaled = (NO_BIAS, NO_RENORMALISATION, NO_SCALE)
    unscaled = (NO_BIAS, NO_RENORMALISATION, {"score": "softmax"})
    norm, as_is = {**NAMED, "norm_topk_prob": True}, {**NAMED, "norm_topk_prob": False}
    cohere, cohere_norm = Routing(score="topk_sigmoid"), replace(SIGMOID, score="topk_sigmoid")
    return [
        Family("deepseek_v4.DeepseekV4TopKRouter", ROUTED, v4, (*scaled, {"score": "sigmoid"})),
        Family(
            "inkling2.Inkling2TopKRouter",
            ROUTED,
            replace(v4, score="sigmoid"),
            (*scaled, {"score": "sqrtsoftplus"}),
            model_type="inkling2_text",
        ),
        Family("minimax_m2.MiniMaxM2TopKRouter", LOCAL, BIASED, unscaled, bias_given=True),
        Family(
            "minimax_m3_vl.MiniMaxM3VLTopKRouter",
            LOCAL,
            BIASED,
            unscaled,
            model_type="minimax_m3_vl_text",
        ),
        Family(
            "hy_v3.HYV3TopKRouter",
            {**NAMED, "router_scaling_factor": 1.7},
            replace(BIASED, epsilon=1e-20, scale=1.7),
            scaled,
            bias_given=True,
        ),
        Family(
            "afmoe.AfmoeTokenChoiceRouter",
            {**NAMED, "route_scale": 1.7},
            replace(BIASED, epsilon=1e-20, scale=1.7),
            scaled,
            bias_given=True,
        ),
        Family(
            "lfm2_moe.Lfm2MoeTopKRouter",
            {**norm, "routed_scaling_factor": 1.7},
            replace(BIASED, epsilon=1e-6, scale=1.7),
            scaled,
            bias_given=True,
        ),
        Family(
            "lfm2_moe.Lfm2MoeTopKRouter",
            {**as_is, "use_expert_bias": False},
            Routing(score="sigmoid"),
            ({"renormalise": True}, {"score": "softmax"}),
            "as is",
        ),
        Family("flint.FlintTopKRouter", norm, SIGMOID, (NO_RENORMALISATION, {"score": "softmax"})),
        Family(
            "laguna.LagunaTopKRouter",
            {**NAMED, "moe_router_logit_softcapping": 1.5},
            replace(BIASED, softcap=1.5),
            (*unscaled, {"softcap": None}, {"softcap": 3.0}),
        ),
        Family(
            "laguna.LagunaTopKRouter",
            {**NAMED, "moe_router_logit_softcapping": 0.0},
            replace(BIASED, softcap=0.0),
            ({"softcap": 3.0},),
            "without a cap",
        ),
        Family(
            "cohere2_moe.Cohere2MoeTopKRouter",
            {**norm, "expert_selection_fn": "sigmoid"},
            cohere_norm,
            (NO_RENORMALISATION, {"score": "topk_softmax"}),
            "by sigmoid",
        ),
        Family(
            "cohere2_moe.Cohere2MoeTopKRouter",
            {**as_is, "expert_selection_fn": "sigmoid"},
            cohere,
            ({"renormalise": True}, {"score": "topk_softmax"}),
            "by sigmoid as is",
        ),
        Family(
            "kolibri1.Kolibri1TopKRouter",
            norm,
            replace(cohere_norm, selection_bias=True),
            (NO_BIAS, NO_RENORMALISATION, {"score": "sigmoid"}),
        ),
    ]


FAMILIES = [
    *softmax_families(),
    *topk_softmax_families(),
    *grouped_families(),
    *softmax_variants(),
    *sigmoid_variants(),
]


def hf_class(path: str) -> Any:
    """`module.Class` of `transformers.models`."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)


def hf_config(model_type: str, **values: Any) -> Any:
    return AutoConfig.for_model(model_type, hidden_size=D, **values)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights, for logits of about 2, and random correction biases, mostly negative."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("correction_bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) * 1.6 - 1.2)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 2 * D**-0.5)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def router_weight(router: nn.Module) -> Tensor:
    """The `[E, D]` parameter, whatever its family calls it."""
    (weight,) = (p for p in router.parameters() if tuple(p.shape) == (E, D))
    return weight.detach()


def same(ours: Routed, theirs: Routed, tolerance: float = 1e-6) -> bool:
    """Whether the chosen sets are equal and the weights agree, in whatever order the k come."""
    our_order, their_order = ours.experts_TK.argsort(-1), theirs.experts_TK.argsort(-1)
    if not torch.equal(
        ours.experts_TK.gather(-1, our_order), theirs.experts_TK.gather(-1, their_order)
    ):
        return False
    gap = ours.weights_TK.gather(-1, our_order) - theirs.weights_TK.gather(-1, their_order)
    return bool((gap.abs() <= tolerance).all())


def dense(routed: Routed, width: int = E) -> Tensor:
    """`[T, width]`: each token's weight per expert."""
    zeros = routed.weights_TK.new_zeros(len(routed.weights_TK), width)
    return zeros.scatter(-1, routed.experts_TK, routed.weights_TK)


@dataclass
class Decided:
    """What a router of transformers decided, and what it decided from."""

    logits: Tensor
    bias: Tensor | None
    theirs: Routed
    top_k: int

    def ours(self, routing: Routing) -> Routed:
        bias_E = self.bias if routing.selection_bias else None
        return route(self.logits, routing, self.top_k, correction_bias_E=bias_E)


def decide(family: Family) -> Decided:
    """Run a family's own router on random tokens."""
    config = hf_config(family.type, **family.config)
    router = hf_class(family.router)(config).eval()
    randomise(router)
    assert router.top_k == family.top_k  # the config's names were understood
    x_TD = inputs()
    biases = [t for n, t in router.state_dict().items() if n.endswith("correction_bias")]
    if family.bias_given:
        biases = [torch.linspace(-1.2, 0.4, E)[torch.randperm(E, generator=seeded(3))]]
    seen = x_TD[None] if family.type == "afmoe" else x_TD
    with torch.no_grad():
        _, weights_TK, experts_TK = router(seen, *(biases if family.bias_given else ()))
    logits_TE = router_logits(x_TD, router_weight(router), getattr(router, "bias", None))
    bias_E = biases[0].reshape(-1) if biases else None
    return Decided(logits_TE.detach(), bias_E, Routed(weights_TK, experts_TK), family.top_k)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- transformers' routers -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_agrees_with_transformers(family: Family) -> None:
    decided = decide(family)
    assert same(decided.ours(family.routing), decided.theirs)
    for change in family.broken:
        broken = replace(family.routing, **change)
        assert broken != family.routing
        assert not same(decided.ours(broken), decided.theirs), f"{change} went unnoticed"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.type in all_architectures()], ids=str)
def test_forms_state_what_transformers_does(family: Family) -> None:
    """The family's form, reading the same config, gives the decisions of the family's router."""
    form = all_architectures()[family.type].routing
    assert form is not None
    assert form.resolve(family.config) == form.resolve(
        {**hf_config(family.type, **family.config).to_dict(), **family.config}
    )
    decided = decide(family)
    assert same(decided.ours(form.resolve(family.config)), decided.theirs)


@pytest.mark.parametrize(
    ("model_type", "config", "routing"),
    [
        ("llama4_text", {}, Routing(score="topk_sigmoid", applied_to="input")),
        ("jetmoe", {}, TOPK_SOFTMAX),
        ("gemma4_text", {}, replace(RENORMALISED, expert_scale=True)),
        ("zaya", {}, replace(SOFTMAX, selection_bias=True)),
        (
            "dbrx",
            {"ffn_config": {"moe_normalize_expert_weights": 2.0}},
            replace(RENORMALISED, norm_p=2.0),
        ),
        (
            "beam",
            {"routed_scaling_factor": 1.7, "n_group": 4, "topk_group": 2},
            GROUPED,
        ),
        (
            "laguna",
            {"moe_routed_scaling_factor": 1.7},
            replace(BIASED, scale=1.7, softcap=0.0),
        ),
    ],
)
def test_forms_of_the_families_below(
    model_type: str, config: dict[str, Any], routing: Routing
) -> None:
    form = all_architectures()[model_type].routing
    assert form is not None
    assert form.resolve(config) == routing


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.routing.selection_bias and f.routing.renormalise], ids=str
)
def test_weights_from_biased_scores_are_noticed(family: Family) -> None:
    decided = decide(family)
    ours = decided.ours(family.routing)
    assert decided.bias is not None
    unscaled = replace(family.routing, renormalise=False, scale=1.0)
    plain = decided.ours(unscaled).weights_TK + decided.bias[ours.experts_TK]
    biased = plain / plain.sum(-1, keepdim=True) * family.routing.scale
    assert not same(Routed(biased, ours.experts_TK), decided.theirs)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "kimi_linear"])
def test_rejected_groups_stay_rejected_when_scores_are_negative(model_type: str) -> None:
    (family,) = (f for f in FAMILIES if str(f) == model_type)
    router = hf_class(family.router)(hf_config(model_type, **family.config)).eval()
    randomise(router)
    router.e_score_correction_bias -= 3
    _, weights_TK, experts_TK = router(inputs())
    logits_TE = router_logits(inputs(), router_weight(router))
    bias_E = router.e_score_correction_bias
    ours = route(logits_TE, family.routing, K, correction_bias_E=bias_E)
    assert same(ours, Routed(weights_TK.detach(), experts_TK))
    assert bool(((logits_TE.sigmoid() + bias_E) < 0).all())
    assert all(len(set(row)) <= 2 for row in (ours.experts_TK // 4).tolist())


def test_epsilon_is_added_to_the_sum() -> None:
    """Where the sum is as small as the epsilon: 1e-6 in LFM2, 1e-20 in DeepSeek-V3."""
    for name, logit in (("lfm2_moe", -14.0), ("deepseek_v3", -46.0)):
        (family,) = (f for f in FAMILIES if str(f) == name)
        router = hf_class(family.router)(hf_config(name, **family.config)).eval()
        bias_E = torch.zeros(E)
        with torch.no_grad():
            router.weight.copy_(torch.eye(E, D))
            x_TD = logit + torch.rand(T, D, generator=seeded(0))
            given = (bias_E,) if family.bias_given else ()
            theirs = Routed(*router(x_TD, *given)[1:])
        for epsilon, expected in ((family.routing.epsilon, True), (0.0, False)):
            routing = replace(family.routing, epsilon=epsilon)
            ours = route(x_TD[:, :E], routing, K, correction_bias_E=bias_E)
            assert same(ours, theirs) is expected


def test_llama4_weighs_the_input() -> None:
    routing = Routing(score="topk_sigmoid", applied_to="input")
    router = hf_class("llama4.Llama4Router")(hf_config("llama4_text", **LOCAL))
    randomise(router)
    with torch.no_grad():
        weights_TE, logits_TE = router(inputs())
    ours = route(logits_TE, routing, K)
    torch.testing.assert_close(dense(ours), weights_TE, atol=1e-6, rtol=0)
    assert torch.equal(dense(ours) > 0, weights_TE > 0)
    for broken in (replace(routing, renormalise=True), TOPK_SOFTMAX):
        assert not torch.allclose(dense(route(logits_TE, broken, K)), weights_TE, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, None])
def test_dbrx_divides_by_a_norm(p: float | None) -> None:
    ffn: dict[str, Any] = {
        "moe_num_experts": E,
        "moe_top_k": K,
        "ffn_hidden_size": 8,
        "hidden_size": D,
    }
    ffn["moe_normalize_expert_weights"] = p
    config = AutoConfig.for_model("dbrx", d_model=D, n_heads=4, n_layers=1, ffn_config=ffn)
    block = hf_class("dbrx.DbrxFFN")(config)
    randomise(block.router)
    with torch.no_grad():
        logits_TE = block.router(inputs())
        theirs = Routed(*block.route_tokens_to_experts(logits_TE))
    routing = replace(RENORMALISED, renormalise=p is not None, norm_p=p)
    assert same(route(logits_TE, routing, K), theirs)
    assert not same(route(logits_TE, replace(routing, renormalise=p is None), K), theirs)
    assert same(route(logits_TE, replace(routing, norm_p=2.0), K), theirs) is (p != 1.0)


def test_jetmoe() -> None:
    router = hf_class("jetmoe.JetMoeTopKGating")(D, E, K)
    randomise(router)
    with torch.no_grad():
        _, tokens, gates, sizes, logits_TE = router(inputs())
    theirs_TE = torch.zeros(T, E)
    theirs_TE[tokens, torch.arange(E).repeat_interleave(torch.tensor(sizes))] = gates
    ours_TE = dense(route(logits_TE, TOPK_SOFTMAX, K))
    torch.testing.assert_close(ours_TE, theirs_TE, atol=1e-6, rtol=0)
    broken_TE = dense(route(logits_TE, SOFTMAX, K))
    assert not torch.allclose(broken_TE, theirs_TE, atol=1e-6)


def test_gemma4_scales_each_expert() -> None:
    config = hf_config("gemma4_text", num_experts=E, top_k_experts=K)
    router = hf_class("gemma4.Gemma4TextRouter")(config)
    randomise(router)
    logits: list[Tensor] = []
    router.proj.register_forward_hook(lambda _module, _args, out: logits.append(out))
    with torch.no_grad():
        router.proj.weight.mul_(D)
        theirs = Routed(*router(inputs())[1:])
    scale_E = router.per_expert_scale.detach()
    routing = replace(RENORMALISED, expert_scale=True)
    ours = route(logits[0], routing, K, expert_scale_E=scale_E)
    assert same(ours, theirs)
    assert routing.sums_to is None
    assert not same(route(logits[0], RENORMALISED, K), theirs)
    before = route(logits[0], SOFTMAX, K).weights_TK * scale_E[ours.experts_TK]
    before = before / before.sum(-1, keepdim=True)  # scaled before renormalising
    assert not same(Routed(before, ours.experts_TK), theirs)


def test_deepseek_v4_routes_by_a_table() -> None:
    router = hf_class("deepseek_v4.DeepseekV4HashRouter")(
        hf_config("deepseek_v4", **ROUTED, vocab_size=50)
    )
    randomise(router)
    draw = seeded(2)
    table_VK = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(50)])
    router.tid2eid.copy_(table_VK)
    ids_T = torch.randint(50, (T,), generator=draw)
    with torch.no_grad():
        theirs = Routed(*router(inputs(), ids_T)[1:])
    logits_TE = router_logits(inputs(), router_weight(router))
    (scheme,) = (f.routing for f in FAMILIES if str(f) == "deepseek_v4")
    ours = route(logits_TE, scheme, K, chosen_TK=table_VK[ids_T])
    assert same(ours, theirs)
    assert torch.equal(ours.experts_TK, table_VK[ids_T])
    other = route(logits_TE, scheme, K, chosen_TK=table_VK[(ids_T + 1) % 50])
    assert not same(other, theirs)


def test_zaya_has_a_class_for_no_expert() -> None:
    """Its last class skips the layer: transformers reports it as expert 0 of weight 0."""
    config = hf_config("zaya", num_experts=E, num_experts_per_tok=1, router_hidden_size=24)
    router = hf_class("zaya.ZayaRouter")(config, layer_idx=0)
    randomise(router)
    router.balancing_biases.uniform_(-0.1, 0.1, generator=seeded(4))
    router.balancing_biases[-1] = 0.3
    with torch.no_grad():
        router.router_mlp.norm.weight.fill_(1)
        router.router_mlp.out_proj.weight.mul_(8)
        logits_TE, weights_TK, experts_TK, _ = router(inputs()[None])
    routing = replace(SOFTMAX, selection_bias=True)
    ours = route(logits_TE, routing, 1, correction_bias_E=router.balancing_biases)
    skipped = ours.experts_TK == E
    assert 0 < int(skipped.sum()) < skipped.numel()
    assert torch.equal(ours.experts_TK.masked_fill(skipped, 0), experts_TK)
    expected = ours.weights_TK.masked_fill(skipped, 0)
    torch.testing.assert_close(expected, weights_TK, atol=1e-6, rtol=0)


class ShowWeights(nn.Module):
    """Stands for a block's experts: its output is the weights they were given, one column each."""

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return dense(Routed(weights_TK, experts_TK), D)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("model_type", "block", "values", "routing"),
    [
        (
            "beam",
            "beam.BeamMoE",
            {**NAMED, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7},
            GROUPED,
        ),
        (
            "laguna",
            "laguna.LagunaSparseMoeBlock",
            {**NAMED, "moe_routed_scaling_factor": 1.7, "shared_expert_intermediate_size": 8},
            replace(BIASED, scale=1.7),
        ),
        (
            "minimax_m3_vl_text",
            "minimax_m3_vl.MiniMaxM3VLSparseMoeBlock",
            {**LOCAL, "routed_scaling_factor": 1.7, "shared_intermediate_size": 8},
            replace(BIASED, scale=1.7),
        ),
    ],
)
def test_scale_after_the_experts(
    model_type: str, block: str, values: dict[str, Any], routing: Routing
) -> None:
    config = hf_config(model_type, moe_intermediate_size=8, **values)
    moe = hf_class(block)(config).eval()
    randomise(moe.gate)
    moe.experts, moe.shared_experts = ShowWeights(), Nothing()
    with torch.no_grad():
        theirs_TE = moe(inputs()[None])[0, :, :E]
    logits_TE = router_logits(inputs(), router_weight(moe.gate))
    bias_E = moe.gate.e_score_correction_bias.detach()
    ours = route(logits_TE, routing, K, correction_bias_E=bias_E)
    torch.testing.assert_close(dense(ours), theirs_TE, atol=1e-6, rtol=0)
    broken = route(logits_TE, replace(routing, scale=1.0), K, correction_bias_E=bias_E)
    assert not torch.allclose(dense(broken), theirs_TE, atol=1e-6)


# --- closed forms --------------------------------------------------------------------------------

THIRDS = [0.0, math.log(2), math.log(3)]  # softmax: 1/6, 1/3, 1/2


@pytest.mark.parametrize(
    ("routing", "logits", "k", "experts", "weights"),
    [
        (SOFTMAX, THIRDS, 2, [2, 1], [1 / 2, 1 / 3]),
        (RENORMALISED, THIRDS, 2, [2, 1], [0.6, 0.4]),
        (TOPK_SOFTMAX, THIRDS, 2, [2, 1], [0.6, 0.4]),
        (replace(RENORMALISED, scale=2.5), THIRDS, 2, [2, 1], [1.5, 1.0]),
        (replace(RENORMALISED, epsilon=1 / 6), THIRDS, 2, [2, 1], [1 / 2, 1 / 3]),
        (replace(RENORMALISED, floor=2.0), THIRDS, 2, [2, 1], [1 / 4, 1 / 6]),
        (replace(RENORMALISED, norm_p=2.0), THIRDS, 2, [2, 1], [3 / 13**0.5, 2 / 13**0.5]),
        (SOFTMAX, THIRDS, 3, [2, 1, 0], [1 / 2, 1 / 3, 1 / 6]),
        (SOFTMAX, [7.0], 1, [0], [1.0]),
        (Routing(score="sigmoid"), [0.0, math.log(3)], 2, [1, 0], [0.75, 0.5]),
        (SIGMOID, [0.0, math.log(3)], 2, [1, 0], [0.6, 0.4]),
        (Routing(score="topk_sigmoid"), [0.0, math.log(3)], 1, [1], [0.75]),
        (
            Routing(score="sqrtsoftplus"),
            [math.log(math.e - 1), math.log(math.e**4 - 1)],
            2,
            [1, 0],
            [2.0, 1.0],
        ),
        (Routing(score="sigmoid", softcap=2.0), [0.0, 500.0], 1, [1], [1 / (1 + math.exp(-2))]),
        (
            Routing(score="sparsemixer", jitter=0.01),
            [0.5, 1.0, 0.99],
            2,
            [1, 2],
            [1 / (1 + math.exp(-0.01)), 1.0],
        ),
    ],
)
def test_closed_forms(
    routing: Routing, logits: list[float], k: int, experts: list[int], weights: list[float]
) -> None:
    routed = route(torch.tensor([logits], dtype=torch.float64), routing, k)
    assert routed.experts_TK.tolist() == [experts]
    assert routed.weights_TK[0].tolist() == pytest.approx(weights, abs=1e-12)


def test_a_correction_bias_chooses_and_does_not_weigh() -> None:
    logits_TE = torch.tensor([[0.0, math.log(3), -math.log(3)]])  # sigmoid: 0.5, 0.75, 0.25
    bias_E = torch.tensor([0.0, -1.0, 0.5])  # chosen by: 0.5, -0.25, 0.75
    routed = route(logits_TE, BIASED, 2, correction_bias_E=bias_E)
    assert routed.experts_TK.tolist() == [[2, 0]]
    assert routed.weights_TK[0].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_group_is_worth_its_maximum_or_its_top_two() -> None:
    logits_TE = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    scheme = Routing(score="sigmoid", groups=2, top_groups=1)
    assert route(logits_TE, scheme, 1).experts_TK.tolist() == [[2]]
    assert route(logits_TE, replace(scheme, group_score="max"), 1).experts_TK.tolist() == [[0]]
    assert route(logits_TE, replace(scheme, top_groups=2), 1).experts_TK.tolist() == [[0]]


# --- ties, dtypes, gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("score", get_args(Score))
def test_ties_go_to_the_lower_index(score: Score) -> None:
    logits_TE = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    experts_TK = route(logits_TE, Routing(score=score), 2).experts_TK
    assert experts_TK.tolist() == [[1, 2], [0, 1]]


def test_tied_groups_go_to_the_lower_index() -> None:
    scheme = Routing(score="sigmoid", groups=4, top_groups=2)
    experts_TK = route(torch.zeros(3, 16), scheme, 8).experts_TK
    assert experts_TK.tolist() == [list(range(8))] * 3


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=300), st.data())
def test_top_indices_is_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert top_indices(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computes_in_fp32_or_fp64(dtype: torch.dtype) -> None:
    logits_TE = torch.randn(T, E, generator=seeded(0)).to(dtype)
    routed = route(logits_TE, RENORMALISED, K)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert routed.weights_TK.dtype == wide
    assert routed.experts_TK.dtype == torch.int64
    expected = route(logits_TE.to(wide), RENORMALISED, K)
    assert torch.equal(routed.weights_TK, expected.weights_TK)
    x_TD, weight_ED = inputs().to(dtype), torch.randn(E, D, generator=seeded(1)).bfloat16()
    assert router_logits(x_TD, weight_ED).dtype == wide


@pytest.mark.parametrize("routing", [RENORMALISED, TOPK_SOFTMAX, GROUPED], ids=lambda r: r.score)
def test_weights_have_the_right_gradient(routing: Routing) -> None:
    logits_TE = torch.randn(3, 8, generator=seeded(5), dtype=torch.float64, requires_grad=True)
    bias_E = torch.zeros(8) if routing.selection_bias else None
    assert torch.autograd.gradcheck(
        lambda z: route(z, routing, 3, correction_bias_E=bias_E).weights_TK, logits_TE
    )


def test_no_tokens() -> None:
    routed = route(torch.zeros(0, E), replace(GROUPED, selection_bias=False), K)
    assert routed.weights_TK.shape == routed.experts_TK.shape == (0, K)


# --- laws ----------------------------------------------------------------------------------------

SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrtsoftplus", "topk_softmax", "topk_sigmoid")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Routing, int]:
    """Logits, a scheme without tensors of its own, and a top-k."""
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    routing = Routing(
        score=draw(st.sampled_from(SCORES)),
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.5, 2.5])),
        softcap=draw(st.sampled_from([None, 4.0])),
    )
    generator = seeded(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 5)), experts)
    logits_TE = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    return logits_TE, routing, top_k


@settings(deadline=None)
@given(cases())
def test_weights_are_nonnegative_and_sum_as_stated(case: tuple[Tensor, Routing, int]) -> None:
    logits_TE, routing, top_k = case
    routed = route(logits_TE, routing, top_k)
    assert routed.weights_TK.shape == (len(logits_TE), top_k)
    assert bool((routed.weights_TK >= 0).all())
    assert all(len(set(row)) == top_k for row in routed.experts_TK.tolist())
    if routing.sums_to is not None:
        assert routed.weights_TK.sum(-1).tolist() == pytest.approx(
            [routing.sums_to] * len(logits_TE)
        )
    else:
        assert not routing.renormalise


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_renumbering_experts_renumbers_the_choice(
    case: tuple[Tensor, Routing, int], random: Any
) -> None:
    logits_TE, routing, top_k = case
    order = list(range(logits_TE.shape[1]))
    random.shuffle(order)
    plain, shuffled = (route(z, routing, top_k) for z in (logits_TE, logits_TE[:, order]))
    assert torch.equal(torch.tensor(order)[shuffled.experts_TK], plain.experts_TK)
    torch.testing.assert_close(shuffled.weights_TK, plain.weights_TK)


@settings(deadline=None)
@given(cases(), st.floats(-50, 50))
def test_softmax_ignores_a_constant(case: tuple[Tensor, Routing, int], constant: float) -> None:
    logits_TE, routing, top_k = case
    for score in ("softmax", "topk_softmax"):
        scheme = replace(routing, score=score, softcap=None)
        moved = route(logits_TE + constant, scheme, top_k)
        assert same(moved, route(logits_TE, scheme, top_k), 1e-12)


@settings(deadline=None)
@given(cases())
def test_renormalised_softmax_is_softmax_over_the_chosen(
    case: tuple[Tensor, Routing, int],
) -> None:
    logits_TE, _, top_k = case
    over_all = route(logits_TE, RENORMALISED, top_k)
    assert same(over_all, route(logits_TE, TOPK_SOFTMAX, top_k), 1e-12)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "top_k", "tensors", "said"),
    [
        (SOFTMAX, 9, {}, "top_k (9) must lie in 1..8"),
        (SOFTMAX, 0, {}, "top_k (0) must lie in 1..8"),
        (replace(SIGMOID, groups=3, top_groups=1), 2, {}, "8 experts don't divide into 3 groups"),
        (replace(SIGMOID, groups=2, top_groups=3), 2, {}, "top_groups (3) must lie in 1..2"),
        (replace(SIGMOID, groups=4, top_groups=1), 3, {}, "top_k (3) exceeds what 1 groups of 2"),
        (replace(SIGMOID, groups=8, top_groups=4), 3, {}, "groups have 1: use fewer groups"),
        (BIASED, 2, {}, "correction_bias_E is missing"),
        (BIASED, 2, {"correction_bias_E": torch.zeros(1, 8)}, "must be [8] (got [1, 8])"),
        (SIGMOID, 2, {"correction_bias_E": torch.zeros(8)}, "no use for correction_bias_E"),
        (replace(SOFTMAX, expert_scale=True), 2, {}, "expert_scale_E is missing"),
        (SOFTMAX, 2, {"expert_scale_E": torch.ones(8)}, "no use for expert_scale_E"),
        (SOFTMAX, 2, {"chosen_TK": torch.zeros(5, 3)}, "must be [5, 2] (got [5, 3])"),
        (SOFTMAX, 1, {"chosen_TK": torch.full((5, 1), 8)}, "names experts 8..8, and there are 8"),
        (Routing(score="sparsemixer"), 3, {}, "sparsemixer always picks 2 (top_k = 3)"),
        (
            Routing(score="sparsemixer", renormalise=True),
            2,
            {},
            "sparsemixer knows no correction bias, groups or renormalisation",
        ),
        (
            Routing(score="sparsemixer"),
            2,
            {"chosen_TK": torch.zeros(5, 2)},
            "sparsemixer chooses by itself",
        ),
    ],
)
def test_errors_say_what_does_not_fit(
    routing: Routing, top_k: int, tensors: dict[str, Tensor], said: str
) -> None:
    with pytest.raises(OptionError) as caught:
        route(torch.zeros(5, 8), routing, top_k, **tensors)
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_errors_come_together() -> None:
    scheme = replace(GROUPED, groups=3, expert_scale=True)
    with pytest.raises(OptionError) as caught:
        route(torch.zeros(5, 8), scheme, 9)
    assert len(caught.value.problems) == 4
    with pytest.raises(OptionError, match="flatten batch and sequence"):
        route(torch.zeros(2, 5, 8), SOFTMAX, 2)
