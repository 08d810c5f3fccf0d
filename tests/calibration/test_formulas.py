"""Every measure against its formula, recomputed in fp64 token by token, without batches, padding,
streaming, or any of the code under test.

Run: pytest tests/calibration/test_formulas.py
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from tiny_models import TINY
from transformers import AutoModelForCausalLM

import moe_compose as mc
from moe_compose.architectures import find
from moe_compose.calibration.stats import MEASURES
from moe_compose.calibration.tokens import Rows, TokenSet
from moe_compose.errors import UnsupportedError

#: Family → the module whose input is the residual stream before the experts; "" where that is what
#: the experts are given.
FAMILIES = {
    "qwen3_moe": "post_attention_layernorm",  # softmax, renormalised
    "qwen2_moe": "post_attention_layernorm",  # a shared expert behind a gate
    "deepseek_v3": "post_attention_layernorm",  # sigmoid, correction bias, groups, shared experts
    "gpt_oss": "post_attention_layernorm",  # gate and up interleaved, biases, clamped
    "flex_olmo": "",  # norms after the block
}
SLOW = {
    "mixtral": "post_attention_layernorm",
    "granitemoe": "post_attention_layernorm",  # a multiplier behind the block
    "dbrx": "norm_attn_norm.norm_2",  # no layout describes its matrices
    "longcat_flash": "post_attention_layernorm.0",  # experts without an FFN
    "cohere2_moe": "input_layernorm",  # attention beside the experts
}
OPTIONS = mc.CalibrateOptions(batch=3, dtype="float64")


def brute(source: mc.Checkpoint, tokens: TokenSet, before: str) -> dict[tuple[Any, ...], Any]:
    """(layer, half, domain, measure) → a list by expert."""
    model = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    seen: dict[int, dict[str, Any]] = defaultdict(dict)

    def keep_experts(i: int) -> Any:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[i] |= {"given": (*args, *kwargs.values()), "output": output, "module": module}

        return keep

    def keep_residual(i: int) -> Any:
        return lambda module, args, output: seen[i].__setitem__("h", args[0])

    for i, layer in enumerate(layers):
        for module in layer.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_hook(keep_experts(i), with_kwargs=True)
        if before:
            layer.get_submodule(before).register_forward_hook(keep_residual(i))
    form = mc.inspect(source).experts
    found: dict[tuple[Any, ...], Any] = defaultdict(lambda: [0.0] * form.num_experts)
    for sequence in tokens.sequences:
        with torch.no_grad():
            model(torch.tensor([sequence.ids]))
            for i, parts in seen.items():
                if "given" in parts:
                    add_tokens(found, (i, sequence.half, sequence.domain), parts)
    return found


def add_tokens(found: dict, key: tuple[int, int, int], parts: dict[str, Any]) -> None:
    x, ids, gates = parts["given"][:3]
    x = x.reshape(-1, x.shape[-1])
    y = parts["output"].reshape(x.shape)
    h = parts.get("h", x).reshape(x.shape)
    for t in range(len(x)):
        cosine = float(h[t] @ (h[t] + y[t]) / (h[t].norm() * (h[t] + y[t]).norm()))
        for k in range(ids.shape[1]):
            e, g = int(ids[t, k]), float(gates[t, k])
            if e >= len(found[(*key, "count")]):
                continue
            one = torch.tensor([[e, e]]), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
            f = parts["module"].forward(x[t : t + 1], *one)
            norm = math.sqrt(float((f * f).sum()))
            values = (1, g, norm, norm**2, g * norm, max(1 - cosine, 0) * g * norm)
            for measure, value in zip(MEASURES, values, strict=True):
                found[(*key, measure)][e] += value
            peak = float(f.abs().max())
            found[(*key, "peak")][e] = max(found[(*key, "peak")][e], peak)


@pytest.mark.parametrize(
    ("family", "before"),
    [*FAMILIES.items(), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW.items())],
)
def test_measures(tiny: Any, tokens: TokenSet, family: str, before: str) -> None:
    source = tiny(family)
    stats = mc.calibrate(source, tokens, OPTIONS)
    expected = brute(source, tokens, before)
    assert {key[0] for key in expected} == set(stats.layers)
    for (layer, half, domain, measure), values in expected.items():
        name = stats.domains[domain]
        ours = (
            stats.peak(layer, name, half)
            if measure == "peak"
            else stats.sums(layer, name, half)[measure]
        )
        wanted = torch.tensor(values, dtype=torch.float64)
        # some routers compute in fp32 even here
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-9)


def test_padding_never_counts(tiny: Any, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny("qwen3_moe")
    alone = mc.calibrate(source, tokens, mc.CalibrateOptions(batch=1, dtype="float64"))
    padded = mc.calibrate(source, tokens, OPTIONS)
    assert same(alone, padded)
    assert float(padded.sums(1)["count"].sum()) == 2 * sum(tokens.tokens.values())
    everything = property(lambda rows: torch.ones_like(rows.batch.ids, dtype=torch.bool))
    monkeypatch.setattr(Rows, "real", everything)
    assert not same(alone, mc.calibrate(source, tokens, OPTIONS)), "the control must fail"


def same(one: mc.ExpertStats, other: mc.ExpertStats, tolerance: float = 1e-10) -> bool:
    return all(
        torch.allclose(t, other.layers[i].tensors[name], rtol=tolerance, atol=tolerance)
        for i, layer in one.layers.items()
        for name, t in layer.tensors.items()
    )


def test_order_and_batches_change_nothing(tiny: Any, tokens: TokenSet) -> None:
    """Within rounding: a matrix product of other rows rounds otherwise."""
    source, runs = tiny("qwen3_moe"), []
    for size in (1, 3, 8):
        options = mc.CalibrateOptions(batch=size)
        runs.append(mc.calibrate(source, tokens, options))
    assert same(runs[0], runs[1], 2e-5) and same(runs[0], runs[2], 2e-5)
    again = mc.calibrate(source, tokens, mc.CalibrateOptions(batch=3))
    for name, table in again.layers[1].tensors.items():
        assert torch.equal(table, runs[1].layers[1].tensors[name]), "the same run, the same bits"


def test_dtypes_agree(tiny: Any, tokens: TokenSet) -> None:
    source = tiny("qwen3_moe")
    by_dtype = {
        dtype: mc.calibrate(source, tokens, mc.CalibrateOptions(dtype=dtype)).sums(1)
        for dtype in ("float64", "float32", "bfloat16")
    }
    exact = by_dtype["float64"]
    for measure, table in by_dtype["float32"].items():
        torch.testing.assert_close(table, exact[measure], rtol=1e-5, atol=1e-5)
    near = by_dtype["bfloat16"]["norm"].sum() / exact["norm"].sum()
    assert abs(float(near) - 1) < 0.01


def test_domains_and_halves_sum_to_the_whole(tiny: Any, tokens: TokenSet) -> None:
    stats = mc.calibrate(tiny("deepseek_v3"), tokens, OPTIONS)
    for measure, whole in stats.sums(2).items():
        by_domain = sum(stats.sums(2, d)[measure] for d in stats.domains)
        by_half = sum(stats.sums(2, half=h)[measure] for h in (0, 1))
        torch.testing.assert_close(by_domain, whole)
        torch.testing.assert_close(by_half, whole)
    assert stats.tokens() == stats.tokens("a") + stats.tokens("b") == 68
    assert torch.equal(stats.peak(2), torch.maximum(stats.peak(2, "a"), stats.peak(2, "b")))


def test_what_is_known_of_a_layer(tiny: Any, tokens: TokenSet) -> None:
    stats = mc.calibrate(tiny("qwen3_moe"), tokens, OPTIONS)
    together = stats.layers[1].together_EE
    assert torch.equal(together.diagonal(), stats.sums(1)["count"])
    assert torch.equal(together, together.T)
    assert float(together.sum()) == 4 * 68, "each token chooses 2, so 4 pairs with themselves"
    each, mean = stats.entropy(1)
    assert 0 < each < mean <= math.log(6) + 1e-12
    assert stats.agreement(1) == 1.0
    assert float(stats.load_share(1).sum()) == pytest.approx(1)
    assert float(stats.specialisation(1).mean()) == pytest.approx(1)
    assert stats.dead(1) == ()
    assert stats.agreement(1, "a") == 1.0
    grouped = mc.calibrate(tiny("deepseek_v3"), tokens, OPTIONS)
    assert 0 < grouped.agreement(2) < 1, "groups and the correction bias choose otherwise"


def test_memory_does_not_grow_with_experts_times_tokens(tiny: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for t in found if isinstance(found, tuple | list) else [found]:
                if isinstance(t, torch.Tensor):
                    self.most = max(self.most, t.numel())
            return found

    source = tiny("qwen3_moe", num_experts=64)
    row = [i % 93 + 3 for i in range(120)]
    tokens = TokenSet.of_ids({"a": [row] * 16})
    with Largest() as largest:
        mc.calibrate(source, tokens, mc.CalibrateOptions(batch=16))
    weights = 64 * 2 * 24 * 32
    attention = 16 * 4 * 120 * 120
    assert largest.most <= max(weights, attention, 16 * 120 * 64) < 64 * 16 * 120 * 32 / 4


def test_weights_that_multiply_the_input(tiny: Any, tokens: TokenSet) -> None:
    """Llama 4: f is the expert's output on its weighted input, and nothing multiplies it."""
    source = tiny("llama4_text")
    stats = mc.calibrate(source, tokens, OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64).eval()
    block, seen = model.model.layers[3].feed_forward, []
    block.register_forward_hook(lambda module, args, output: seen.append(args[0].reshape(-1, 32)))
    count, gate, norm = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for sequence in tokens.sequences:
            model(torch.tensor([sequence.ids]))
        for x in torch.cat(seen):
            best = (block.router.weight @ x).topk(2)
            for e, g in zip(best.indices, best.values.sigmoid(), strict=True):
                h, up = ((g * x) @ block.experts.gate_up_proj[e]).chunk(2)
                f = (up * torch.nn.functional.silu(h)) @ block.experts.down_proj[e]
                count[e] += 1
                gate[e] += g
                norm[e] += f.norm()
    ours = stats.sums(3)
    assert torch.equal(ours["count"], count) and torch.equal(ours["norm"], ours["gated_norm"])
    torch.testing.assert_close(ours["gate"], gate, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["norm"], norm, rtol=1e-6, atol=0)


#: Families whose experts cannot be watched.
REFUSED = {"jetmoe"}

#: Families where a bias, groups, or a table choose otherwise than the logits' top-k would.
OTHERWISE = {
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "axk1", "glm4_moe", "dots1"),
    *("glm4_moe_lite", "glm_moe_dsa", "solar_open", "mimo_v2_flash", "exaone_moe", "beam", "zaya"),
    *("bailing_hybrid", "kimi_linear", "nemotron_h"),
    *("minimax_m2", "hy_v3", "afmoe", "lfm2_moe", "laguna", "flint", "kolibri1", "longcat_flash"),
    *("ernie4_5_moe",),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family(tiny: Any, tokens: TokenSet, family: str) -> None:
    source = tiny(family)
    form = find(source.config)
    if not form.is_moe:
        return
    if family in REFUSED:
        with pytest.raises(UnsupportedError, match="cannot be watched"):
            mc.calibrate(source, tokens, OPTIONS)
        return
    moe, stats = form.moe(source.config), mc.calibrate(source, tokens, OPTIONS)
    assert tuple(stats.layers) == moe.sparse_layers
    for layer in stats.layers:
        pairs = int(stats.sums(layer)["count"].sum())
        assert pairs == 68 * moe.top_k or (moe.zero_experts and 0 < pairs < 68 * moe.top_k)
        assert float(stats.sums(layer)["easy_ep"].sum()) > 0
        if layer >= moe.routing.hashed_layers:
            agreement = stats.agreement(layer)
            assert agreement == 1.0 or (family in OTHERWISE and 0.2 < agreement < 1)
            each, mean = stats.entropy(layer)
            assert 0 <= each <= mean + 1e-9 <= math.log(moe.num_experts) + 1e-8
