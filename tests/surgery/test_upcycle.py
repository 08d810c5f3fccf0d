"""What each method makes of the neurons, and what is refused.

pytest tests/surgery/test_upcycle.py
"""

import math

import numpy as np
import pytest
import torch
from dense import dense_llama

from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.indices import Sample
from moe_compose.surgery.target import choose_layers
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

F, D, E = 64, 32, 8


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_llama(tmp_path_factory.mktemp("dense"))


def plan_of(dense, method="copy", **changes):
    return upcycle(
        dense, UpcycleOptions(**{"num_experts": E, "top_k": 2, "method": method, **changes})
    )


def ffn(dense, layer=0):
    names = (f"model.layers.{layer}.mlp.{m}_proj.weight" for m in ("gate", "up", "down"))
    return tuple(dense.read(n) for n in names)


def expert(plan, e, layer=0):
    names = (
        f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight" for w in ("w1", "w3", "w2")
    )
    return tuple(plan.read(n) for n in names)


def changed_neurons(dense_ffn, made):
    """Per matrix: which neurons differ (rows of gate and up, columns of down)."""
    (g, u, d), (a, b, c) = dense_ffn, made
    return ((g != a).any(1), (u != b).any(1), (d != c).any(0))


def test_copies_are_copies(dense):
    plan = plan_of(dense)
    for e in range(E):
        assert all(
            torch.equal(a, b) for a, b in zip(ffn(dense, 2), expert(plan, e, 2), strict=True)
        )


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_drop_redraws_one_neuron_set_per_expert(dense, ratio):
    plan = plan_of(dense, "drop", ratio=ratio)
    sets = []
    for e in range(E):
        gate, up, down = changed_neurons(ffn(dense), expert(plan, e))
        assert torch.equal(gate, up), "one set for the three matrices"
        assert torch.equal(up, down), "one set for the three matrices"
        assert int(gate.sum()) == round(ratio * F), "exactly r·F neurons"
        sets.append(tuple(gate.tolist()))
    if 0 < ratio < 1:
        assert len(set(sets)) == E, "another set for every expert"


def test_drop_redraws_from_the_blocks_own_statistics(tmp_path):
    """Mean and deviation of a redrawn block: within sampling error (5 σ) of the block's."""
    wide = dense_llama(tmp_path, intermediate_size=512, hidden_size=64, num_hidden_layers=1)
    plan = plan_of(wide, "drop", num_experts=2)
    gate, up, down = ffn(wide)
    a, b, c = expert(plan, 1)
    at = (gate != a).any(1)
    for old, new in ((gate[at], a[at]), (up[at], b[at]), (down[:, at], c[:, at])):
        n, sigma = old.numel(), float(old.std())
        assert abs(float(new.mean() - old.mean())) < 5 * sigma / math.sqrt(n)
        assert abs(float(new.std()) - sigma) < 5 * sigma / math.sqrt(2 * n)


def test_noise_touches_a_fraction_of_the_neurons(dense):
    plan = plan_of(dense, "noise", ratio=0.25, noise_std=0.05)
    gate, up, down = changed_neurons(ffn(dense), expert(plan, 3))
    assert int(gate.sum()) == F // 4
    assert torch.equal(gate, up)
    assert torch.equal(up, down)
    delta = (expert(plan, 3)[0] - ffn(dense)[0])[gate]
    assert float(delta.std()) == pytest.approx(0.05 * float(ffn(dense)[0].std()), rel=0.1)


def test_granular_experts_are_shards_in_virtual_groups(dense):
    """Expert n = replica·G + shard; √G on up and down, the gate untouched; one router row per
    replica.
    """
    G = 4
    plan = plan_of(dense, "granular", granularity=G, top_k=4)
    gate, up, down = ffn(dense)
    for n in range(E):
        at = slice((n % G) * F // G, (n % G + 1) * F // G)
        a, b, c = expert(plan, n)
        assert torch.equal(a, gate[at])
        assert torch.equal(b, up[at] * 2.0)
        assert torch.equal(c, down[:, at] * 2.0)
    router = plan.read("model.layers.0.block_sparse_moe.gate.weight")
    assert all(torch.equal(router[n], router[n // G * G]) for n in range(E))
    assert not torch.equal(router[0], router[G])


def test_shuffle_uses_every_neuron_once_per_replica(dense):
    plan = plan_of(dense, "shuffle", granularity=2, ratio=0.0)
    gate, _, _ = ffn(dense)
    for replica in range(E // 2):
        both = torch.cat([expert(plan, 2 * replica)[0], expert(plan, 2 * replica + 1)[0]])
        assert torch.equal(both[both[:, 0].argsort()], gate[gate[:, 0].argsort()])
        assert not torch.equal(both, gate)


def test_shuffle_redraws_half(dense):
    plain = plan_of(dense, "shuffle", granularity=2, ratio=0.0)
    redrawn = plan_of(dense, "shuffle", granularity=2)
    differ = (expert(plain, 1)[0] != expert(redrawn, 1)[0]).any(1)
    assert int(differ.sum()) == F // 4


def test_shared_puts_the_ffn_beside_silent_experts(dense):
    plan = plan_of(dense, "shared", target="qwen2_moe")
    base = "model.layers.1.mlp"
    gate, up, down = ffn(dense, 1)
    assert torch.equal(plan.read(f"{base}.shared_expert.gate_proj.weight"), gate)
    assert torch.equal(plan.read(f"{base}.shared_expert.up_proj.weight"), up)
    assert torch.equal(plan.read(f"{base}.shared_expert.down_proj.weight"), down * 2)
    assert (plan.read(f"{base}.shared_expert_gate.weight").abs() < 1e-17).all()
    routed = [plan.read(f"{base}.experts.{e}.gate_proj.weight") for e in range(2)]
    assert not torch.equal(*routed), "routed experts start different"
    assert not plan.read(f"{base}.experts.0.down_proj.weight").any()
    assert plan.preservation.kind == "exact"
    assert plan.constants() == (
        "model.layers.*.mlp.experts.*.down_proj.weight",
        "model.layers.*.mlp.shared_expert_gate.weight",
    )


def test_router_law_and_deviation(dense):
    name = "model.layers.0.block_sparse_moe.gate.weight"
    normal = plan_of(dense, num_experts=256, router_std=0.5).read(name)
    assert float(normal.std()) == pytest.approx(0.5, rel=0.05)
    uniform = plan_of(dense, num_experts=256, router_init="uniform", router_std=0.5).read(name)
    assert float(uniform.abs().max()) <= 0.5 * math.sqrt(3)
    assert float(uniform.std()) == pytest.approx(0.5, rel=0.05)
    assert not plan_of(dense, router_init="zeros").read(name).any()
    drop = plan_of(dense, "drop", num_experts=256).read(name)
    assert float(drop.abs().max()) <= 0.02 * math.sqrt(3), "drop draws its router uniformly"


def test_seeds_change_draws_and_nothing_else(dense):
    a, b = plan_of(dense, "drop", seed=1), plan_of(dense, "drop", seed=2)
    assert not torch.equal(expert(a, 0)[0], expert(b, 0)[0])
    assert torch.equal(a.read("lm_head.weight"), b.read("lm_head.weight"))


def test_layers_draw_apart(dense):
    plan = plan_of(dense, "drop")
    sets = [changed_neurons(ffn(dense, i), expert(plan, 0, i))[0] for i in (0, 1)]
    assert not torch.equal(*sets)


def test_dtype_rounds_once_to_nearest(dense):
    plan = plan_of(dense, "granular", granularity=2, dtype="bfloat16")
    want = (ffn(dense)[1][: F // 2].double() * math.sqrt(2)).float().bfloat16()
    assert torch.equal(expert(plan, 0)[1], want)
    assert {t.dtype for t in plan.tensors.values()} == {"BF16"}
    assert plan.config["dtype"] == "bfloat16"
    rounding = plan.preservation.rounding
    assert (rounding.dtype, rounding.everything, rounding.up) == ("bfloat16", True, math.sqrt(2))


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", {0, 1, 2, 3, 4, 5}), ("every:2", {1, 3, 5}), ("2-4", {2, 3, 4}), ("0, 5", {0, 5})],
)
def test_choosing_layers(text, layers):
    assert choose_layers(text, 6) == layers


@pytest.mark.parametrize("text", ["", "some", "every:0", "4-2", "6", "-1", "1-9", "every:7"])
def test_layers_that_cannot_be_meant(text):
    with pytest.raises(OptionError, match="layers"):
        choose_layers(text, 6)


def test_layer_subsets_where_the_family_can(dense):
    plan = plan_of(dense, target="qwen2_moe", layers="1-2")
    assert plan.config["mlp_only_layers"] == [0]
    assert torch.equal(plan.read("model.layers.0.mlp.up_proj.weight"), ffn(dense, 0)[1])
    assert "model.layers.0.mlp.gate.weight" not in plan.tensors
    with pytest.raises(UnsupportedError, match="mixtral cannot hold dense layers"):
        plan_of(dense, layers="1-2")


def test_all_faults_of_the_options_at_once(dense):
    with pytest.raises(OptionError) as caught:
        plan_of(dense, top_k=9, ratio=2.0, granularity=5, noise_std=-1.0, allow=("all",))
    text = str(caught.value)
    for word in ("top_k (9)", "ratio (2.0)", "granularity (5)", "noise_std", "allow (all)"):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "granular", "granularity": 2, "top_k": 3}, "split-groups"),
        ({"method": "granular", "granularity": 2, "num_experts": 7}, "multiple of the granularity"),
        ({"method": "granular"}, "granularity of 2 or more"),
        ({"granularity": 2}, "no meaning for method copy"),
        ({"target": "olmoe"}, "not exact"),
        ({"target": "nonsense"}, "not exact"),
        ({"method": "shared", "target": "mixtral"}, "no shared expert"),
        ({"method": "melt"}, "method .melt. must be one of"),
    ],
)
def test_refusals_say_why(dense, changes, match):
    with pytest.raises((OptionError, UnsupportedError), match=match):
        plan_of(dense, **changes)


def test_inexact_variants_are_had_by_name(dense):
    split = plan_of(dense, "granular", granularity=2, top_k=3, allow=("split-groups",))
    assert split.preservation.kind == "none"
    rows = plan_of(dense, "granular", granularity=2, allow=("independent-rows",))
    assert rows.preservation.kind == "none"
    router = rows.read("model.layers.0.block_sparse_moe.gate.weight")
    assert not torch.equal(router[0], router[1])


def test_preservation_is_stated(dense):
    kinds = {
        "copy": plan_of(dense).preservation.kind,
        "granular": plan_of(dense, "granular", granularity=2).preservation.kind,
        "noise": plan_of(dense, "noise").preservation.kind,
        "loud noise": plan_of(dense, "noise", noise_std=0.5).preservation.kind,
        "drop": plan_of(dense, "drop").preservation.kind,
        "shuffle": plan_of(dense, "shuffle", granularity=2).preservation.kind,
    }
    assert kinds == {
        "copy": "exact",
        "granular": "exact",
        "noise": "approximate",
        "loud noise": "none",
        "drop": "none",
        "shuffle": "none",
    }


def test_moe_sources_are_refused(dense, tmp_path):
    from moe_compose.checkpoint.writer import write

    moe = write(plan_of(dense), tmp_path / "moe")
    with pytest.raises(UnsupportedError, match="a mixture of experts already"):
        plan_of(moe)


def test_source_facts_without_a_home_are_refused(tmp_path):
    biased = dense_llama(tmp_path / "a", attention_bias=True, mlp_bias=True)
    with pytest.raises(UnsupportedError) as caught:
        plan_of(biased)
    assert "attention_bias (True) has no home" in str(caught.value)
    assert "mlp_bias (True) has no home" in str(caught.value)


def test_expert_widths_that_engines_refuse_are_noted(tmp_path):
    odd = dense_llama(tmp_path, intermediate_size=44)
    assert any("multiple of 8" in n for n in plan_of(odd).notes)


def test_neuron_sets_are_uniform():
    """Over many experts every neuron is drawn about equally often."""
    counts = np.zeros(F)
    for e in range(2000):
        counts[Sample(Draw(0, f"layer 0 expert {e} neurons"), F, F // 2).indices()] += 1
    assert abs(counts / 2000 - 0.5).max() < 5 * math.sqrt(0.25 / 2000)


def test_unnormalised_weights_are_had_by_name(dense):
    """E·G/k on the experts and a small router: approximate; with a large router, worse."""
    options = {"target": "qwen2_moe", "allow": ("unnormalised",), "num_experts": 4}
    plan = plan_of(dense, **options)
    assert plan.config["norm_topk_prob"] is False
    assert plan.preservation.kind == "approximate"
    base = "model.layers.0.mlp"
    assert torch.equal(plan.read(f"{base}.experts.1.down_proj.weight"), ffn(dense)[2] * 2)
    router = plan.read(f"{base}.gate.weight")
    assert float(router.std()) == pytest.approx(0.002, rel=0.3)
    assert plan_of(dense, router_std=0.5, **options).preservation.kind == "none"
    with pytest.raises(OptionError, match="no meaning for mixtral"):
        plan_of(dense, allow=("unnormalised",))


def test_unnormalised_granular_factor(dense):
    """E·G/k in all, its root on up and on down."""
    plan = plan_of(dense, "granular", granularity=2, target="qwen2_moe", allow=("unnormalised",))
    up = plan.read("model.layers.0.mlp.experts.0.up_proj.weight")
    want = ffn(dense)[1][: F // 2] * math.sqrt(E * 2 / 2)
    assert torch.allclose(up, want, rtol=1e-6)


def test_rounding_goes_by_the_ffns_dtype(tmp_path):
    """fp32 embeddings around a bf16 FFN: √2 is rounded to bf16, whatever most bytes are."""
    from mutants import mutant

    dense = dense_llama(tmp_path / "dense", torch.bfloat16)

    def widen(t):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            t[name] = t[name].float().repeat_interleave(1, 0)

    mixed = mutant(dense, tmp_path / "mixed", tensors=widen)
    rounding = plan_of(mixed, "granular", granularity=2).preservation.rounding
    assert (rounding.dtype, rounding.everything) == ("bfloat16", False)
