"""Upcycling through the command line stays small, whatever the size of the model.

The default test compares a model with one three times as large; the slow ones make gigabytes:
pytest tests/e2e/test_memory.py -m slow
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
make_dense = runpy.run_path(str(ROOT / "examples/benchmarks/upcycle_speed.py"))["make_dense"]

#: Runs the command line and prints the process's own peak of resident memory, in KiB: a parent's
#: figure for its child would count what the parent held when it forked.
PROGRAM = """
import sys
from moe_compose_cli.main import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        print(next(l for l in status if l.startswith("VmHWM")).split()[1])
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def peak_mib(dense: Path, moe: Path, *options: str) -> float:
    """Peak resident memory of an upcycle without validation, torch included, in MiB."""
    arguments = ["upcycle", str(dense), str(moe), "--no-validate", "--quiet", *options]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) / 1024


def test_memory_does_not_grow_with_the_model(tmp_path):
    small, large = (
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": n} for n in (4, 12)
    )
    make_dense(tmp_path / "small", small)
    make_dense(tmp_path / "large", large)
    options = ("--num-experts", "4", "--method", "drop")
    one = peak_mib(tmp_path / "small", tmp_path / "moe1", *options)
    three = peak_mib(tmp_path / "large", tmp_path / "moe3", *options)
    assert three < one + 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("copy", ()),
        ("drop", ()),
        ("granular", ("--granularity", "2")),
    ],
)
def test_two_gigabytes_become_eight_under_one(tmp_path, method, options):
    """≥ 2 GB → ≥ 8 GB under 1 GiB of memory, and 4 GB no more than 2 GB."""
    peaks = []
    for layers in (16, 32):
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers}
        dense, moe = tmp_path / f"dense{layers}", tmp_path / f"moe{layers}"
        made = make_dense(dense, shape)
        experts = "10" if method == "granular" else "5"
        peaks.append(peak_mib(dense, moe, "--method", method, "--num-experts", experts, *options))
        written = sum(f.stat().st_size for f in moe.glob("*.safetensors"))
        assert made >= 2e9
        assert written >= 8e9
        for file in (*dense.iterdir(), *moe.iterdir()):
            os.truncate(file, 0)
    assert peaks[0] < 1024
    assert peaks[1] < peaks[0] + 100


@pytest.mark.slow
def test_wide_ffns_stay_under_a_gibibyte(tmp_path):
    """One matrix of 59 million weights (as in 7 B models), redrawn by all workers."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1}
    make_dense(tmp_path / "dense", shape)
    assert peak_mib(tmp_path / "dense", tmp_path / "moe", "--method", "drop") < 1024


@pytest.mark.slow
def test_calibrate_and_prune_hold_a_layer_and_no_more(tmp_path, monkeypatch):
    """3 GB of random MoE in layers of 0.6 GiB: calibration holds the layer, the next one that is
    read ahead, and less than 1.5 GiB besides; pruning less than 1.5 GiB in all.
    """
    monkeypatch.syspath_prepend(str(ROOT / "examples/benchmarks"))
    large = runpy.run_path(str(ROOT / "examples/benchmarks/large_checkpoint.py"))
    made = large["make_moe"](tmp_path / "moe", num_hidden_layers=5, **large["SHAPE"])
    assert made >= 3e9
    _, held, _ = large["calibrate"](tmp_path, 512, "bfloat16")
    assert held < 2 * large["LAYER"] / 2**30 + 1.5
    words = ("--criterion", "random", "--ratio", "0.5", "--no-validate")
    _, held, resident = large["watched"](
        large["tool"]("prune", tmp_path / "moe", tmp_path / "pruned", *words)
    )
    assert held < 1.5
    assert resident < 1.5
