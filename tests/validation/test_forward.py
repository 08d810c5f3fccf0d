"""The forward pass through Triton and through eager, held to fp64.

pytest tests/validation/test_forward.py

Without a GPU every run is a process of its own, in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_checkpoint, tiny_model

import moe_compose as mc
from moe_compose.validation import forward as forward_pass
from moe_compose.validation import forward_cover, validate
from moe_compose.validation.forward_cover import Cover
from moe_compose.validation.forward_layers import Routed, only, part_of, probes
from moe_compose.validation.forward_report import Errors
from moe_compose.validation.text import Sequences

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SOME = Sequences("some ids", tuple(torch.arange(1, 49).reshape(2, 1, 24)))


def check_of(report):
    return next(c for c in report.checks if c.name == "forward")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    plan = mc.upcycle(
        mc.Checkpoint.open(ROOT / "examples/models/stories260K"),
        mc.UpcycleOptions(num_experts=8, top_k=2, dtype="bfloat16"),
    )
    return mc.write(plan, tmp_path_factory.mktemp("moe") / "moe")


@pytest.mark.forward
def test_a_result_runs_through_triton_as_exactly_as_through_eager(moe):
    report = validate(moe)
    found = report.forward
    assert check_of(report).status == "pass" and report.ok
    assert [x.layer for x in found.layers] == [0, 1, 2, 3, 4]
    assert all(x.experts == 8 and x.tokens >= 100 for x in found.layers)
    for layer in found.layers:
        assert layer.errors["float32"].triton < 2e-6
        assert 1e-4 < layer.errors["bfloat16"].triton < 1.5 * layer.errors["bfloat16"].eager
    assert found.logits[0].tokens >= 100 and found.logits[0].errors.triton < 2e-6
    assert not found.left_out
    assert json.loads(json.dumps(report.to_json()))["forward"]["layers"][4]["layer"] == 4


def test_it_is_not_run_when_nobody_wants_it(moe):
    assert check_of(validate(moe, forward_seconds=0)).status == "skip"


def test_a_dense_checkpoint_has_no_such_check():
    report = validate(mc.Checkpoint.open(ROOT / "examples/models/stories260K"), forward_seconds=60)
    assert "forward" not in {c.name for c in report.checks}


@pytest.mark.parametrize("family", ["jetmoe"])
def test_experts_outside_the_interface_are_named(family, tmp_path):
    tiny_checkpoint(family, tmp_path / "m")
    found, check = forward_pass.forward(mc.Checkpoint.open(tmp_path / "m"), SOME)
    assert found is None and check.status == "skip"
    assert "through transformers' interface" in check.detail


def test_what_ends_the_process_is_told(moe, monkeypatch):
    monkeypatch.setattr(forward_pass, "WORKER", "moe_compose.no_such_module")
    found, check = forward_pass.forward(moe, SOME)
    assert found is None and check.status == "fail"
    assert "No module named moe_compose.no_such_module" in check.detail


def test_time_that_is_up_before_anything_was_measured_is_no_verdict(moe, monkeypatch):
    monkeypatch.setattr(forward_pass, "_GRACE", 0.0)
    found, check = forward_pass.forward(moe, SOME, seconds=0.2)
    assert found is None and check.status == "skip" and "in time" in check.detail


FAULTS = """
import dataclasses, json, sys
from moe_compose.kernels import hook
from moe_compose.validation import forward_layers, forward_model

right = hook.layout_of
faults = {
    "none": lambda layout: layout,
    "activation": lambda layout: dataclasses.replace(layout, activation="gelu"),
    "gate and up": lambda layout: dataclasses.replace(layout, interleaved=True),
}
for name, fault in faults.items():
    forward_layers.layout_of = hook.layout_of = lambda module: fault(right(module))
    lines = []
    job = {"path": sys.argv[1], "ids": [list(range(1, 25))], "seconds": 60}
    forward_model.run(job, lines.append)
    layers = [x["layer"]["errors"]["float32"] for x in lines if "layer" in x]
    logits = [x["logits"]["errors"] for x in lines if "logits" in x]
    print(json.dumps([name, [x["triton"] for x in layers + logits]]))
"""


def test_faults_in_the_kernels_are_noticed(moe):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(moe.path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(errors["none"]) == 6 and max(errors["none"]) < 2e-6
    assert min(errors["activation"]) > 1e-3
    assert min(errors["gate and up"]) > 1e-3


def test_probes_reach_the_experts_that_text_does_not():
    torch.manual_seed(0)
    seen = Routed(torch.randn(5, 4), torch.randint(0, 3, (5, 2)), torch.rand(5, 2))
    more = probes(seen, 10)
    reached = set(torch.cat([seen.experts_NK, more.experts_NK]).flatten().tolist())
    assert reached == set(range(10))
    assert len(more.x_ND) == -(-(10 - len(set(seen.experts_NK.flatten().tolist()))) // 2)
    assert len(probes(Routed(seen.x_ND, seen.experts_NK % 2, seen.gates_NK), 2).x_ND) == 0


def test_some_experts_of_a_module_compute_their_share():
    """Parts that share out the experts sum to the whole."""
    model = tiny_model("qwen3_moe")
    module = next(m for m in model.modules() if hasattr(m, "is_concatenated"))
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    torch.manual_seed(0)
    experts = module.num_experts
    ids = torch.rand(9, experts).argsort(-1)[:, :2]
    seen = Routed(torch.randn(9, module.down_proj.shape[1]), ids, torch.rand(9, 2))
    whole, total = module(*seen), torch.zeros(9, seen.x_ND.shape[1], dtype=torch.float64)
    for chosen in (torch.arange(0, experts, 2), torch.arange(1, experts, 2)):
        kept = torch.isin(ids, chosen).any(-1)
        some = only(seen, chosen, experts)
        part = part_of(module, chosen, torch.float64)
        y = part(some.x_ND.double(), some.experts_NK, some.gates_NK.double())
        total[kept] += y
    assert (whole - total).norm() / total.norm() < 1e-6
    assert module.down_proj.dtype == torch.float32 and module.num_experts == experts


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self):
        return self.now


def covered(cover, clock, experts, seconds_each):
    """Ids of the experts that one layer gets to run when each takes so long."""
    found = []
    for ids in cover.parts(experts, weights=10):
        found += ids.tolist()
        clock.now += seconds_each * len(ids)
    return found


def test_every_layer_gets_its_share_of_the_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(forward_cover, "time", clock)
    cover = Cover(60.0, layers=4)
    for _ in range(4):
        assert sorted(covered(cover, clock, 40, 0.1)) == list(range(40))
    assert cover.spent == pytest.approx(16) and cover.affords_logits(2.0)
    slow = Cover(60.0, layers=4)
    runs = [covered(slow, clock, 40, 1.0) for _ in range(4)]
    assert [len(set(ids)) for ids in runs] == [len(ids) for ids in runs]
    assert all(10 <= len(ids) <= 20 for ids in runs) and 50 < slow.spent <= 60
    assert len(set().union(*runs)) > 20, "other experts in other layers"
    assert not slow.affords_logits(0.0)


def test_one_expert_of_one_layer_is_always_run(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(forward_cover, "time", clock)
    cover = Cover(10.0, layers=2)
    assert not cover.up
    assert len(covered(cover, clock, 8, 60.0)) == 1
    assert cover.up
    assert sorted(covered(Cover(None, layers=2), clock, 70, 60.0)) == list(range(70))


def test_limits():
    assert Errors(eager=1e-7, triton=1.9e-6).met("float32")
    assert not Errors(eager=1e-7, triton=2.1e-6).met("float32")
    assert Errors(eager=4e-6, triton=5.9e-6).met("float32")
    assert Errors(eager=2e-3, triton=3e-3).met("bfloat16")
    assert not Errors(eager=2e-3, triton=3.1e-3).met("bfloat16")
    assert not Errors(eager=2e-3, triton=float("nan")).met("bfloat16")


def test_a_triton_that_cannot_be_imported_says_nothing_of_the_checkpoint(
    moe, tmp_path, monkeypatch
):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found, check = forward_pass.forward(moe, SOME)
    assert found is None and check.status == "skip"
    assert "triton cannot be imported" in check.detail and "no driver" in check.detail


def test_a_worker_that_is_killed_says_nothing_of_the_checkpoint(moe, monkeypatch):
    monkeypatch.setattr(forward_pass, "WORKER", "killed")
    monkeypatch.setattr(
        subprocess, "run", lambda words, **rest: subprocess.CompletedProcess(words, -9, "", "")
    )
    found, check = forward_pass.forward(moe, SOME)
    assert found is None and check.status == "skip" and "signal 9" in check.detail
