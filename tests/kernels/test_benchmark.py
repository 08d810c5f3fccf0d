"""The benchmark's machinery on a tiny layer; pytest tests/kernels/test_benchmark.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/benchmarks/moe_kernels.py"


def test_a_smoke_run(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("transformers.integrations.moe")
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--output", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "these timings mean nothing" in done.stdout
    rates, *lines = json.loads(path.read_text())["lines"]
    assert rates["tflops"] > 0 and len(lines) == 8
    for line in lines:
        assert line["floor"] > 0
        assert line["layer"] in done.stdout and line["measure"] in done.stdout
        for name, run in line["runs"].items():
            if name.startswith("Liger"):
                assert run == {"why not": "needs a GPU"}
            else:
                assert run["seconds"] > 0 and run.get("error", 0) < 2e-6, (name, run)
    assert sum("error" in run for line in lines for run in line["runs"].values()) == 10


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "needs a GPU; --smoke tries its machinery" in done.stderr
