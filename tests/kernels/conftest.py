"""Kernels in Triton's interpreter run in a process of their own: triton is either the interpreter
or the compiler, and this process is the compiler's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix(request, tmp_path_factory) -> dict[str, dict]:
    """What the module's `SCRIPT` wrote, started with the path of a JSON file."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("kernels") / "errors.json"
    known = [str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(known),
    }
    done = subprocess.run(
        [sys.executable, str(request.module.SCRIPT), str(path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())
