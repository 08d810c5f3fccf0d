"""The forward pass of a checkpoint through the Triton kernels and through transformers' own eager
experts, both held to fp64: per layer on real text and on probes that reach every expert, and end to
end.

It runs in a process of its own (`forward_worker.py`): triton is either its compiler or its
interpreter, for as long as a process lives, and where there is no GPU it has to be the interpreter.
That one is slow, so what is run is cut to a stated time, and the report says what that was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from moe_compose.architectures import find
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.validation.forward_report import Errors, ForwardPass, LayerForward, LogitForward
from moe_compose.validation.report import Check
from moe_compose.validation.text import Sequences

#: Seconds that the comparison may take where no GPU helps, the start of its process not counted.
SECONDS = 60.0

#: Tokens of text that are run through the interpreter, and how many a sequence has at most.
TOKENS, LONGEST = 128, 64

#: Seconds that importing and a last layer may take beyond what was allowed.
_GRACE = 120.0

WORKER = "moe_compose.validation.forward_worker"


def concerns(source: TensorSource) -> bool:
    """Whether this is an MoE; also where its family is unknown, since it may be one."""
    form = find(source.config)
    return form is None or (form.is_moe and any(form.moe(source.config).sparse))


def forward(
    checkpoint: Checkpoint, texts: Sequences, *, seconds: float = SECONDS
) -> tuple[ForwardPass | None, Check]:
    """Run a checkpoint's forward pass both ways.

    Args:
        checkpoint: a local one, an MoE.
        texts: token ids.
        seconds: what the comparison may take on a machine without a GPU.

    Returns:
        What was measured, if anything, and the check that says so.
    """
    if seconds <= 0:
        return None, Check("forward", "skip", "not run through Triton, as asked")
    if find_spec("triton") is None:
        return None, Check("forward", "skip", "NOT MEASURED: triton is not installed")
    job = {
        "path": str(checkpoint.path),
        "ids": [ids[0].tolist() for ids in texts.ids],
        "seconds": seconds,
    }
    lines, failure, killed = _run(job, seconds)
    for line in lines:
        if "unsupported" in line:
            return None, Check("forward", "skip", f"NOT MEASURED: {line['unsupported']}")
    found = _read(lines, texts.name, seconds)
    if killed:
        return found, Check("forward", "skip", f"NOT MEASURED: {failure}")
    if failure:
        return found, Check("forward", "fail", f"the forward pass does not run: {failure}")
    if found is None:
        return None, Check("forward", "skip", "NOT MEASURED: no layer was done in time")
    return found, Check("forward", "pass" if found.met else "fail", found.verdict)


def _read(lines: Iterable[Mapping[str, Any]], text: str, seconds: float) -> ForwardPass | None:
    """The worker's findings; None if it found nothing."""
    said: dict[str, list[Any]] = {}
    for line in lines:
        for kind, value in line.items():
            said.setdefault(kind, []).append(value)
    if "start" not in said or "layer" not in said:
        return None
    start, left_out = said["start"][0], said.get("left_out", [])
    if "end" not in said:
        left_out.append("the rest: the time was up")
    return ForwardPass(
        device=start["device"],
        triton=start["triton"],
        text=text,
        sparse_layers=start["sparse_layers"],
        layers=tuple(LayerForward(**x | {"errors": _errors(x)}) for x in said["layer"]),
        logits=tuple(
            LogitForward(**x | {"errors": Errors(**x["errors"]), "worst": Errors(**x["worst"])})
            for x in said.get("logits", ())
        ),
        seconds=said["end"][0]["seconds"] if "end" in said else seconds,
        budget=start["budget"],
        left_out=tuple(left_out),
    )


def _errors(layer: Mapping[str, Any]) -> dict[str, Errors]:
    return {dtype: Errors(**e) for dtype, e in layer["errors"].items()}


def _run(job: Mapping[str, Any], seconds: float) -> tuple[list[dict[str, Any]], str, bool]:
    """The lines that the worker wrote; what went wrong, empty if nothing did, or only the time was
    up; and whether the worker was killed, which says nothing of the checkpoint.
    """
    import torch

    known = [p for p in sys.path if p]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(known),
        "OPENBLAS_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", WORKER],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=None if torch.cuda.is_available() else seconds + _GRACE,
        )
        output, failure = done.stdout, _failure(done.returncode, done.stderr)
        killed = done.returncode < 0
    except subprocess.TimeoutExpired as e:
        output = e.stdout.decode() if isinstance(e.stdout, bytes) else (e.stdout or "")
        failure, killed = "", False
    return list(_parsed(output)), failure, killed


def _parsed(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # half a line, when it was stopped


def _failure(code: int, stderr: str) -> str:
    if not code:
        return ""
    if code < 0:
        return f"its process was killed by signal {-code} (too little memory?)"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {code}"
