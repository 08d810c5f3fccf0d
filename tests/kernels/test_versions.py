"""The kernels' own tests with other versions of triton, in processes of their own.

    pip install --no-deps --target DIR/triton36 triton==3.6.0      and so on
    TRITONS=DIR/triton36:DIR/triton37 pytest tests/kernels/test_versions.py -m slow

`TRITONS` names the folders; without it there is nothing to do. Interpreter and compiler both: the
matrices, and of what is compiled the part that runs by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [Path(folder).resolve() for folder in os.environ.get("TRITONS", "").split(":") if folder]
TESTS = sorted(
    str(path)
    for path in Path(__file__).parent.glob("test_*.py")
    if path.stem not in ("test_versions", "test_reference", "test_hook", "test_grouped")
)


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS or [None], ids=str)
def test_another_triton(folder):
    if folder is None:
        pytest.skip("TRITONS names no folder with another triton")
    version = run(folder, "-c", "import triton; print(triton.__file__, triton.__version__)")
    assert str(folder) in version
    run(folder, "-m", "pytest", "-p", "no:cacheprovider", *TESTS)
