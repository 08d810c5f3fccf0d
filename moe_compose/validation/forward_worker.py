"""The process that runs a forward pass through Triton; started by `forward.py`.

A job comes in as JSON on stdin; findings go out as JSON lines on stdout, as they come, so that what
was measured is not lost when the time is up.

Without a GPU, triton has to be its interpreter, which is decided when it is first imported.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from importlib import import_module
from typing import Any

import torch


def main() -> None:
    """Run the job on stdin."""
    job = json.load(sys.stdin)
    findings, sys.stdout = sys.stdout, sys.stderr  # whatever else speaks is no finding
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def say(line: dict[str, Any]) -> None:
        findings.write(json.dumps(line) + "\n")
        findings.flush()

    try:
        import_module("triton")
    except Exception as e:  # a broken install raises whatever it likes
        said = str(e).strip().splitlines()
        return say({"unsupported": f"triton cannot be imported: {said[0] if said else e!r}"})
    from moe_compose.validation.forward_model import run

    run(job, say)


def _end_with(parent: int) -> None:
    """End with the process that asked, however that one ends."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
