"""The step-0 receipt on real weights: it passes what is exact and fails five broken controls.

pytest tests/validation/test_receipt.py
"""

import math
from pathlib import Path

import pytest
import torch
from mutants import mutant

import moe_compose as mc
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write
from moe_compose.surgery.plan import Preservation
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions
from moe_compose.validation import validate
from moe_compose.validation.parity import agree, judge
from moe_compose.validation.report import Agreement

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


@pytest.fixture(scope="module")
def stories():
    return Checkpoint.open(STORIES)


@pytest.fixture(scope="module")
def results(stories, tmp_path_factory):
    """Method → (written checkpoint, stated class), from the shipped real model."""
    folder, made = tmp_path_factory.mktemp("results"), {}
    for method, granularity in (("copy", 1), ("granular", 2)):
        for dtype in (None, "bfloat16"):
            options = UpcycleOptions(
                num_experts=4, top_k=2, method=method, granularity=granularity, dtype=dtype
            )
            plan, name = upcycle(stories, options), f"{method}{' in bf16' if dtype else ''}"
            made[name] = write(plan, folder / name), plan.preservation
    return made


@pytest.mark.parametrize("method", ["copy", "granular"])
def test_exact_is_exact(stories, results, method):
    checkpoint, stated = results[method]
    report = validate(checkpoint, against=stories, preservation=stated, tokens=512)
    fp32 = report.receipt.agreements[0]
    assert report.ok
    assert fp32.relative_error <= 1e-6
    assert fp32.kl <= 1e-9
    assert fp32.top1 == 1.0
    assert fp32.loss == pytest.approx(fp32.reference_loss, abs=1e-5)


def tie_by_shard(t):
    """Router rows equal across replicas instead of across the shards of one."""
    for i in range(5):
        row = t[f"model.layers.{i}.block_sparse_moe.gate.weight"]
        row.copy_(row[[0, 2, 0, 2]])


def cube_root(t):
    """√2 on up and down replaced by the cube root of 2 on all three: SiLU is not homogeneous."""
    for i in range(5):
        for e in range(4):
            t[EXPERTS.format(i, e, "w1")] *= 2 ** (1 / 3)
            for w in ("w2", "w3"):
                t[EXPERTS.format(i, e, w)] *= 2 ** (1 / 3) / math.sqrt(2)


def swap_down(t):
    for i in range(5):
        a, b = EXPERTS.format(i, 0, "w2"), EXPERTS.format(i, 1, "w2")
        t[a], t[b] = t[b], t[a]


def scale_gate(t):
    for i in range(5):
        for e in range(4):
            t[EXPERTS.format(i, e, "w1")] *= 1.01


def wrong_theta(c):
    c["rope_theta"] = c["rope_parameters"]["rope_theta"] = 1e6


CONTROLS = {
    "wrong rope theta": ("copy", {"config": wrong_theta}),
    "scaled gate": ("copy", {"tensors": scale_gate}),
    "router rows tied by shard": ("granular", {"tensors": tie_by_shard}),
    "cube-root scaling": ("granular", {"tensors": cube_root}),
    "down projections swapped": ("granular", {"tensors": swap_down}),
}


@pytest.mark.parametrize("where", ["", " in bf16"])
@pytest.mark.parametrize("control", CONTROLS)
def test_broken_controls_fail(stories, results, tmp_path, control, where):
    """Rounding weights to 16 bits does not blunt the comparison: fp32 sees through it."""
    method, change = CONTROLS[control]
    checkpoint, stated = results[method + where]
    broken = mutant(checkpoint, tmp_path / "broken", **change)
    report = validate(broken, against=stories, preservation=stated, tokens=256)
    assert report.receipt is not None, "structure alone does not show it"
    assert not report.receipt.met
    assert not report.ok


@pytest.mark.parametrize("method", ["copy in bf16", "granular in bf16"])
def test_rounded_weights_are_compared_with_weights_so_rounded(stories, results, method):
    checkpoint, stated = results[method]
    report = validate(checkpoint, against=stories, preservation=stated, tokens=512)
    wide, low = report.receipt.agreements
    assert report.ok
    assert wide.relative_error <= 1e-6
    assert (low.dtype, low.median_error <= 1.5 * low.noise) == ("bfloat16", True)


def test_a_tie_of_groups_in_bf16_is_no_fault_of_the_weights(stories, tmp_path):
    """32 experts in groups of 4: router logits of two groups tie in 16 bits for some tokens."""
    options = UpcycleOptions(
        num_experts=32, top_k=4, method="granular", granularity=4, dtype="bfloat16"
    )
    plan = upcycle(stories, options)
    checkpoint = write(plan, tmp_path / "moe")
    assert validate(checkpoint, against=stories, preservation=plan.preservation).ok


def test_approximate_and_redrawn_say_their_loss(stories, tmp_path):
    for method, kind in (("noise", "approximate"), ("drop", "none")):
        plan = upcycle(stories, UpcycleOptions(num_experts=4, top_k=2, method=method))
        report = validate(
            write(plan, tmp_path / method),
            against=stories,
            preservation=plan.preservation,
            tokens=256,
        )
        assert plan.preservation.kind == kind
        assert report.ok
        assert "loss" in report.receipt.verdict


def figures(**changes):
    base = {
        "dtype": "float32", "max_error": 1e-6, "relative_error": 1e-7, "median_error": 1e-7,
        "kl": 1e-13, "top1": 1.0, "loss": 2.0, "reference_loss": 2.0, "guessing": 4.0,
    }  # fmt: skip
    return Agreement(**{**base, **changes})


@pytest.mark.parametrize(
    ("agreements", "met"),
    [
        ([figures()], True),
        ([figures(relative_error=1.1e-6)], False),
        ([figures(kl=1.1e-9)], False),
        ([figures(relative_error=math.nan)], False),
        ([figures(), figures(median_error=0.01, noise=0.01, noise_top1=0.99)], True),
        ([figures(), figures(median_error=0.02, noise=0.01, noise_top1=0.99)], False),
        ([figures(), figures(median_error=0.01, noise=0.01, noise_top1=1.0, top1=0.99)], False),
    ],
)
def test_exact_class_has_limits(agreements, met):
    assert judge(agreements, Preservation("exact", "a test"), 1000)[0] is met


def test_agreement_against_closed_forms(tmp_path):
    """Logits shifted by a constant: no KL. Two equal logits against one preferred: a KL known by
    hand.
    """
    import numpy as np

    from moe_compose.validation.text import Sequences

    ids = Sequences("x", (torch.tensor([[0, 1, 0]]),))
    zero = np.memmap(tmp_path / "a", np.float32, "w+", shape=(3, 2))
    shifted = np.memmap(tmp_path / "b", np.float32, "w+", shape=(3, 2))
    shifted[:] = 5
    same = agree("float32", zero, shifted, ids)
    assert same.kl == pytest.approx(0, abs=1e-15)
    assert same.loss == pytest.approx(math.log(2))
    shifted[:] = [math.log(3), 0]
    tilted = agree("float32", zero, shifted, ids)
    assert tilted.kl == pytest.approx(-math.log(2 * math.sqrt(3 / 16)), rel=1e-6)
    assert tilted.loss == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-6)


def test_worse_than_guessing_is_no_upcycle(stories, tmp_path):
    """Whatever a plan redraws on purpose, the rest of the model must be left in working order."""
    plan = upcycle(stories, UpcycleOptions(num_experts=4, top_k=2, method="drop"))
    checkpoint = write(plan, tmp_path / "moe")

    def loud(t):
        t["model.embed_tokens.weight"] *= -100

    broken = mutant(checkpoint, tmp_path / "broken", tensors=loud)
    report = validate(broken, against=stories, preservation=plan.preservation, tokens=256)
    assert not report.receipt.met


def test_copied_tensors_are_compared_bit_for_bit(stories, tmp_path):
    """A drop result may compute anything; a flipped bit in what was copied is found."""
    plan = upcycle(stories, UpcycleOptions(num_experts=4, top_k=2, method="drop"))
    checkpoint = mc.write(plan, tmp_path / "moe")
    assert "model.layers.*.self_attn.q_proj.weight" in plan.copied()
    assert validate(checkpoint, against=stories, tokens=256).ok

    def nudge(t):
        t["model.layers.3.self_attn.q_proj.weight"][0, 0] += 1e-6

    report = validate(mutant(checkpoint, tmp_path / "broken", tensors=nudge), against=stories)
    copies = next(c for c in report.checks if c.name == "copies")
    assert copies.status == "fail"
    assert copies.problems == ("model.layers.3.self_attn.q_proj.weight",)
