"""Do other engines load this checkpoint, and compute what transformers computes?

An engine that is installed beside us, or whose Python is given, is run: the same prompts, greedily,
in float32, in a process of its own (`worker.py`). Of the others only the rules of the portable
profile are known.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.validation.memory import memory_available
from moe_compose.validation.profile import broken_rules
from moe_compose.validation.report import Served
from moe_compose.validation.text import Sequences

#: Tokens of text that engines read, how many a prompt has at most, and how many each goes on for.
TOKENS, LONGEST, NEW_TOKENS = 256, 32, 16

#: Largest difference of two logprobs that is rounding, in nats. Faults that were seen made 1e-2 and
#: more; rounding in float32 stays under 5e-5 on tiny models and grows with depth.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Engine:
    """One that checkpoints are written for.

    Attributes:
        name: as rules of the portable profile call it.
        module: what tells whether it is installed; empty: it is not looked for.
        word: the worker's; empty: it cannot be run here.
    """

    name: str
    module: str = ""
    word: str = ""

    @property
    def key(self) -> str:
        """What `--engine-python` calls it."""
        return self.name.lower().replace(" ", "-")


ENGINES = (
    Engine("transformers 4", "", "transformers"),
    Engine("vLLM", "vllm", "vllm"),
    Engine("SGLang"),
    Engine("llama.cpp", "llama_cpp", "llama.cpp"),
    Engine("mlx-lm", "mlx_lm", "mlx-lm"),
)

#: An engine's findings: its version, and path → what it answered, or `{"error": ...}`.
Answers = tuple[str, Mapping[str, Mapping[str, Any]]]


class UnavailableError(Exception):
    """An engine that does not even start; says why."""


def ask(
    word: str,
    python: str | Path,
    models: Sequence[Path],
    prompts: Sequence[Sequence[int]],
    new_tokens: int = NEW_TOKENS,
) -> Answers:
    """Let one engine go on greedily from prompts, in float32.

    Args:
        word: the worker's, such as vllm.
        python: an interpreter that can import the engine.
        models: folders.
        prompts: token ids.
        new_tokens: how many to generate.

    Returns:
        Its version; by folder, `answers` (a `prompt`, `tokens` and `logprobs` for each prompt) and
        `notes`, or an `error`.

    Raises:
        UnavailableError: it cannot be imported there, or its process ended before the first model.
    """
    job = {"models": [str(m) for m in models], "prompts": prompts, "new_tokens": new_tokens}
    others = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    ours = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    own = Path(python) == Path(sys.executable)
    try:
        done = subprocess.run(
            [str(python), str(Path(__file__).with_name("worker.py")), word],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=others | (ours if own else {}),
        )
    except OSError as e:
        raise UnavailableError(f"{python} does not start: {e.strerror}") from e
    lines = list(_parsed(done.stdout))
    if not lines or "unavailable" in lines[0]:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UnavailableError(lines[0]["unavailable"] if lines else said[-1])
    found = {line.pop("path"): line for line in lines[1:]}
    ended = {"error": f"its process ended with exit code {done.returncode}"}
    return lines[0]["version"], {str(m): found.get(str(m), ended) for m in models}


def _parsed(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # half a line, of a process that was killed
        if isinstance(found, dict):
            yield found


def difference(
    answers: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> tuple[int, float]:
    """How two engines' answers to the same prompts compare.

    Returns:
        Prompts after which both say the same tokens; and the largest difference of two logprobs of
        the same tokens after the same ones, in nats.
    """
    same, largest = 0, 0.0
    for a, b in zip(answers, reference, strict=True):
        pairs = list(zip(a["prompt"], b["prompt"], strict=True))
        for x, y, p, q in zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True):
            if x != y:
                break
            pairs.append((p, q))
        else:
            same += 1
        gaps = [abs(p - q) for p, q in pairs]
        largest = max(largest, *(math.inf if math.isnan(gap) else gap for gap in gaps))
    return same, largest


def pythons_of(given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Interpreters that were asked for, by engine.

    Raises:
        OptionError: an engine that cannot be run, or an interpreter that is not there; all of them.
    """
    keys = {e.key: e.name for e in ENGINES if e.word}
    problems = [
        f"{name!r} is no engine that can be run; there are {', '.join(keys)}"
        for name in given
        if name.lower() not in keys
    ]
    paths = {name: Path(path).expanduser().absolute() for name, path in given.items()}
    problems += [
        f"{name}: there is no {path}" for name, path in paths.items() if not path.is_file()
    ]
    if problems:
        raise OptionError("these engines cannot be run", problems=problems)
    return {keys[name.lower()]: path for name, path in paths.items()}


def check_engines(
    checkpoint: TensorSource, texts: Sequences | None, pythons: Mapping[str, Path], why_not: str
) -> tuple[Served, ...]:
    """What every engine makes of a checkpoint.

    Args:
        checkpoint: a local one, or a plan.
        texts: prompts.
        pythons: engine → its interpreter; others are run if they are installed here.
        why_not: why nothing is run; empty: it is.
    """
    rules = broken_rules(checkpoint)
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else None
    if path is None or texts is None:
        why_not = why_not or "a plan is run once it is written"
    runs = dict(_installed()) | dict(pythons)
    why_not = why_not or (_shortage(checkpoint) if runs else "")
    prompts = [] if texts is None else [ids[0].tolist() for ids in texts.ids]
    with code_left_out(path if runs and not why_not else None) as folder:
        found = [*_run_all(folder, runs, prompts, why_not)]
    return tuple(
        replace(
            one,
            rules=tuple(r for r in rules if names(r, one.engine)),
            asked=one.engine in pythons,
        )
        for one in found
    )


def _run_all(
    folder: Path | None,
    runs: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    why_not: str,
) -> Iterator[Served]:
    """Every engine's findings; those of none are run without a folder."""
    reference: Sequence[Mapping[str, Any]] = ()
    if folder is not None:
        reference, why_not = _reference(folder, prompts)
    for engine in ENGINES:
        if engine.name not in runs or why_not or folder is None:
            why = why_not if engine.name in runs else _missing(engine)
            yield Served(engine.name, "", "not run", why)
        else:
            yield _serve(engine, runs[engine.name], folder, prompts, reference)


@contextmanager
def code_left_out(path: Path | None) -> Iterator[Path | None]:
    """A folder without code of its own: the checkpoint's, or, where it holds any, one of links to
    its other files. Some engines and converters run such code unasked.
    """
    from moe_compose.runtime.pretrained import without_code

    if path is None:
        yield None
        return
    documents = {name: _document(path / name) for name in ("config.json", "tokenizer_config.json")}
    plain = {name: without_code(found) for name, found in documents.items()}
    for found in plain.values():
        found.pop("model_file", None)  # mlx-lm's
    if plain == documents and not any(path.glob("*.py")):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="moe-compose-") as work:
        folder = Path(work, path.name)
        folder.mkdir()
        for file in path.iterdir():
            if file.suffix != ".py" and file.name not in plain:
                (folder / file.name).symlink_to(file.resolve())
        for name, found in plain.items():
            if found:
                (folder / name).write_text(json.dumps(found), encoding="utf-8")
        yield folder


def _document(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _reference(
    path: Path, prompts: Sequence[Sequence[int]]
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """What transformers answers here; or why it does not."""
    try:
        _, found = ask("transformers", sys.executable, [path], prompts)
        error = found[str(path)].get("error")
    except UnavailableError as e:
        error = str(e)
    if error:
        return (), f"transformers itself does not run it: {error}"
    return found[str(path)]["answers"], ""


def names(rule: str, engine: str) -> bool:
    """Whether a rule of the portable profile says that it concerns an engine."""
    return engine in rule or "every engine" in rule


def _installed() -> Iterator[tuple[str, Path]]:
    for engine in ENGINES:
        if engine.module and find_spec(engine.module) is not None:
            yield engine.name, Path(sys.executable)


def _missing(engine: Engine) -> str:
    if not engine.word:
        return "it has no build for a CPU, so it was never run here"
    return f"not installed here (--engine-python {engine.key}=PYTHON)"


def _shortage(checkpoint: TensorSource) -> str:
    """Why the whole model cannot be in memory, in float32; empty if it can."""
    needed = 4 * sum(info.numel for info in checkpoint.tensors.values())
    free = memory_available()
    if free is None or needed < free:
        return ""
    return f"takes {needed / 2**30:.1f} GiB of memory in float32, {free / 2**30:.1f} GiB are free"


def _serve(
    engine: Engine,
    python: Path,
    path: Path,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Mapping[str, Any]],
) -> Served:
    """Run one engine and compare."""
    try:
        version, found = ask(engine.word, python, [path], prompts)
    except UnavailableError as e:
        return Served(engine.name, "", "not run", f"{python} does not run it: {e}")
    answered = found[str(path)]
    if "error" in answered:
        return Served(engine.name, version, "refuses", answered["error"])
    same, largest = difference(answered["answers"], reference)
    text = f"greedy tokens equal transformers' after {same} of {len(prompts)} prompts, logprobs "
    text += f"within {largest:.1e} nats"
    text = "; ".join((text, *answered["notes"]))
    good = same == len(prompts) and largest <= TOLERANCE
    return Served(engine.name, version, "same" if good else "differs", text, largest)
