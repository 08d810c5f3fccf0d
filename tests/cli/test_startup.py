"""What a command may cost before it does anything: no torch, no transformers, no numpy.

Run: pytest tests/cli/test_startup.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hand_made import Make

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub")
PROBE = """
import json, sys
from moe_compose_cli.main import run
heavy, *words = sys.argv[1:]
code = run(words)
found = [name for name in heavy.split() if name in sys.modules]
print(json.dumps([code, found]), file=sys.stderr)
"""


def probe(*words: str, heavy: tuple[str, ...] = HEAVY) -> tuple[int, list[str]]:
    """Exit code, and heavy modules that were imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, " ".join(heavy), *words],
        capture_output=True,
        text=True,
        check=True,
    )
    code, found = json.loads(done.stderr.splitlines()[-1])
    return code, found


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("upcycle", "--help"),
        ("validate", "--help"),
        ("ls", "methods"),
        ("ls", "architectures"),
        ("ls", "architectures", "--json"),
    ],
)
def test_torch_is_not_imported(words: tuple[str, ...]) -> None:
    assert probe(*words) == (0, [])


@pytest.mark.parametrize("words", [("--help",), ("prune", "--help"), ("add-expert", "--help")])
def test_help_loads_no_surgery(words: tuple[str, ...]) -> None:
    """Options are described apart from what carries them out."""
    rooms = ("moe_compose.architectures", "moe_compose.surgery.plan", "moe_compose.runtime")
    assert probe(*words, heavy=(*HEAVY, *rooms)) == (0, [])


@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_nor_by_inspect(make: Make, flag: str) -> None:
    folder = make("mixtral").path
    assert probe("inspect", str(folder), flag) == (0, [])
    assert probe("inspect", str(folder)) == (0, [])


def test_nor_by_the_package_itself() -> None:
    code = (
        "import sys, moe_compose as mc; mc.Checkpoint, mc.UpcycleOptions, mc.inspect, mc.write;"
        f"print([n for n in {HEAVY} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_terminal_without_utf_8(make: Make) -> None:
    folder = str(make("mixtral", name="mödel").path)
    program = "from moe_compose_cli.main import main; main()"
    for words in (["inspect", folder, "--json"], ["inspect", folder]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=True,
        )
        if "--json" in words:
            assert json.loads(done.stdout)["checkpoint"] == "mödel"
        else:
            assert done.stdout.startswith(b"m\\xf6del")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "from moe_compose_cli.main import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, "ls", "architectures", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    child.wait()
    assert err == b""
