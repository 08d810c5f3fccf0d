"""What a run leaves behind for the next one: everything that the next step depends on.

job.json               what is trained on what; another run's state is refused
state-0000050.0.pt     after step 50: copies, optimizer, the best so far; one file a process
                       where the model is sharded, else the first one's
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_compose.checkpoint.copying import os_errors, write_file
from moe_compose.errors import CheckpointError, WriteError
from moe_compose.training.engine import Engine

JOB = "job.json"
_STATE = re.compile(r"state-(\d+)\.(\d+)\.pt")


class States:
    """The states of one run, in a folder; None: none are kept.

    Args:
        folder: where.
        engine: the processes.
    """

    def __init__(self, folder: Path | None, engine: Engine) -> None:
        self._folder, self._engine = folder, engine

    def begin(self, job: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Make the folder, or take up the last whole state that lies there.

        Raises:
            WriteError: there is an interrupted run and it is not to be resumed, or it is another.
        """
        if self._folder is None:
            return None
        steps = self._steps()
        if steps and not resume:
            raise WriteError(
                f"{self._folder.name} holds a run that was interrupted after step {max(steps)}",
                hint="Continue it with --resume, or start again with --overwrite.",
            )
        if steps:
            self._check(job)
            return self._load(max(steps))
        if resume and any(self._folder.glob("state-*.pt")):
            raise WriteError(
                f"{self._folder.name} holds the shards of another number of processes",
                hint="Start as many as before, or start again with --overwrite.",
            )
        self._engine.wait()
        if self._engine.rank == 0:
            with os_errors(f"write {self._folder}"):
                self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(job, indent=2, sort_keys=True)
            write_file(self._folder / JOB, text.encode())
        self._engine.wait()
        return None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep the state after a step, and let go of those before once it is whole."""
        if self._folder is None:
            return
        earlier = [p for p in self._folder.glob("state-*.pt") if _STATE.fullmatch(p.name)]
        if self._engine.rank == 0 or self._engine.sharded:
            path = self._folder / self._name(step)
            new = path.with_suffix(".new")
            with os_errors(f"write {path}"):
                torch.save(dict(state), new)
                new.replace(path)
        self._engine.wait()
        if self._engine.rank == 0:
            for path in earlier:
                path.unlink(missing_ok=True)
        self._engine.wait()

    def _steps(self) -> list[int]:
        """Steps of which every process's file is there."""
        assert self._folder is not None
        needed = self._engine.size if self._engine.sharded else 1
        found: dict[int, set[int]] = {}
        for path in self._folder.glob("state-*.pt"):
            if match := _STATE.fullmatch(path.name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
        return [step for step, ranks in found.items() if len(ranks) == needed]

    def _name(self, step: int) -> str:
        return f"state-{step:07d}.{self._engine.rank if self._engine.sharded else 0}.pt"

    def _load(self, step: int) -> dict[str, Any]:
        assert self._folder is not None
        path = self._folder / self._name(step)
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # whatever a damaged file makes torch raise
            raise CheckpointError(
                f"cannot read {path.name} ({e})", hint="Start again with --overwrite."
            ) from e
        return found

    def _check(self, job: Mapping[str, Any]) -> None:
        assert self._folder is not None
        try:
            other = json.loads((self._folder / JOB).read_bytes())
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"cannot read {self._folder.name}/{JOB} ({e})",
                hint="Start again with --overwrite.",
            ) from e
        mine = json.loads(json.dumps(job))
        problems = [
            f"{n}: then {other.get(n)}, now {mine.get(n)}"
            for n in sorted(mine.keys() | other.keys())
            if mine.get(n) != other.get(n)
        ]
        if problems:
            raise WriteError(
                f"{self._folder.name} is of another run, which this one cannot continue",
                problems=problems,
                hint="Give the same model, text and options, or start again with --overwrite.",
            )
