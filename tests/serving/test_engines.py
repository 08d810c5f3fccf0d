"""Results of surgery in real engines: the same greedy tokens and logprobs as in transformers, fp32.

    tests/serving/environments.sh       # once: some 15 CPU-minutes, 7 GB
    pytest -m serving

An engine whose environment is not built is skipped. Controls: experts exchanged, router rows moved;
what an engine is known to compute differently must differ.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import served
from mutants import Tensors, mutant
from served import CASES, ENGINES, NEW_TOKENS, PROMPTS, TOLERANCE

import moe_compose as mc
from moe_compose.validation.engines import ask, difference, names
from moe_compose.validation.profile import broken_rules

pytestmark = pytest.mark.serving

NAMES = [f"{operation} {family}" for operation, family in CASES]
#: One of every family, whose experts differ.
DAMAGED = [n for n in NAMES if n.startswith("prune")]
#: Those that are damaged for every engine to see.
SHOWN = ["prune mixtral", "prune deepseek_v3"]

Found = dict[str, dict[str, Any]]


def exchange_experts(tensors: Tensors) -> None:
    """Experts 0 and 1 of the last layer, without their router rows."""
    for name in [n for n in tensors if ".layers.1." in n and ".experts." in n]:
        if ".experts.0." in name:
            other = name.replace(".experts.0.", ".experts.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif not re.search(r"\.experts\.\d", name):
            tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]


def move_router(tensors: Tensors) -> None:
    """The last layer's router rows, by one."""
    (name,) = (n for n in tensors if ".layers.1." in n and n.endswith(ROUTERS))
    tensors[name] = tensors[name].roll(1, 0)


ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight")
DAMAGE: dict[str, Callable[[Tensors], None]] = {
    "experts exchanged": exchange_experts,
    "router moved": move_router,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name → folder of every result, and of damaged ones."""
    folder = tmp_path_factory.mktemp("served")
    found = dict(served.results(folder))
    for name in DAMAGED:
        for what, change in DAMAGE.items():
            broken = mutant(mc.Checkpoint.open(found[name]), folder / f"{name}, {what}", change)
            assert broken.path is not None
            found[broken.path.name] = broken.path
    return found


@pytest.fixture(scope="session")
def reference(folders: dict[str, Path]) -> Found:
    return answers("transformers", served.python_of("mlx-lm"), folders)


@pytest.fixture(scope="session")
def served_by(folders: dict[str, Path]) -> Callable[[str], Found]:
    """A function: an engine's answers, made once."""
    made: dict[str, Found] = {}
    shown = {n: f for n, f in folders.items() if "," not in n or n.split(",")[0] in SHOWN}

    def served_by(engine: str) -> Found:
        if engine not in made:
            word, _ = ENGINES[engine]
            made[engine] = answers(word, built(engine), shown)
        return made[engine]

    return served_by


def built(engine: str) -> Path:
    python = served.python_of(engine)
    if not python.exists():
        pytest.skip(f"{engine} is not there: run {served.BUILD} {python.parts[-3]}")
    return python


def answers(word: str, python: Path, folders: dict[str, Path]) -> Found:
    _, found = ask(word, python, list(folders.values()), PROMPTS, NEW_TOKENS)
    return {name: dict(found[str(folder)]) for name, folder in folders.items()}


def apart(found: dict[str, Any], reference: dict[str, Any]) -> bool:
    same, largest = difference(found["answers"], reference["answers"])
    return same < len(PROMPTS) or largest > TOLERANCE


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_served(
    engine: str,
    case: str,
    served_by: Callable[[str], Found],
    reference: Found,
    folders: dict[str, Path],
) -> None:
    found, verdict = served_by(engine)[case], served.expected(engine, case)
    if verdict == "refuses":
        assert "error" in found
        return
    assert "error" not in found, found
    same, largest = difference(found["answers"], reference[case]["answers"])
    if verdict == "same":
        assert (same, largest <= TOLERANCE) == (len(PROMPTS), True), largest
    else:
        assert apart(found, reference[case])
        rules = broken_rules(mc.Checkpoint.open(folders[case]))
        assert any(names(rule, engine) for rule in rules), "the portable profile says so"


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_noticed(case: str, what: str, reference: Found) -> None:
    assert apart(reference[f"{case}, {what}"], reference[case])


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("case", SHOWN)
@pytest.mark.parametrize("engine", ENGINES)
def test_damage_is_noticed_by_engines(
    engine: str, case: str, what: str, served_by: Callable[[str], Found], reference: Found
) -> None:
    """And the engine computes the damaged checkpoint as it is."""
    found = served_by(engine)[f"{case}, {what}"]
    assert apart(found, reference[case])
    assert not apart(found, reference[f"{case}, {what}"])


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[str]:
    """`transformers serve` with a result; its address."""
    program = built("transformers_serve").with_name("transformers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", folders["upcycle mixtral"], "--port", port, "--host", "127.0.0.1"]
    words += ["--dtype", "float32", "--device", "cpu"]
    with subprocess.Popen([program, *map(str, words)]) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                if process.poll() is None and not _up(address):
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()


def _up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def test_over_http(server: str, folders: dict[str, Path]) -> None:
    """Text in, text out: the tokenizer travels along, and the tokens are those of the reference."""
    from transformers import AutoTokenizer

    folder, text = folders["upcycle mixtral"], "Once upon a time there was"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, found = ask(
        "transformers", served.python_of("mlx-lm"), [folder], [tokenizer(text).input_ids], 8
    )
    expected = found[str(folder)]["answers"][0]["tokens"]
    job = {"model": str(folder), "prompt": text, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(job).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        said = json.load(response)["choices"][0]["text"]
    assert said == tokenizer.decode(expected, skip_special_tokens=True)
