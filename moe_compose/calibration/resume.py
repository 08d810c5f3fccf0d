"""What a run leaves behind for the next one: the finished layers, beside the place of the result.

`STATS.partial/` holds `job.json` (what is being measured on what) and, for every finished layer,
its sums. A resumed run streams all layers again, since each needs the one before, but measures only
those that are missing: the finished ones cost a plain forward pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_compose.calibration import files
from moe_compose.calibration.similarity import file_of
from moe_compose.calibration.stats import LayerStats
from moe_compose.checkpoint.copying import os_errors, write_file
from moe_compose.errors import CheckpointError, WriteError

JOB = "job.json"


class Partial:
    """The folder beside a result that is being made. A result that is to be replaced stays until
    the new one is whole.

    Args:
        folder: the place of the result.
        job: what is measured on what, plain values.
        similarity: whether each layer also has a file of similarities.

    Attributes:
        folder: the place of the result.
        path: where it is made.
        similarity: as given.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], *, similarity: bool) -> None:
        self.folder = folder
        self.path = partial_of(folder)
        self._job, self.similarity = dict(job), similarity

    def begin(self, *, resume: bool, overwrite: bool) -> dict[int, LayerStats]:
        """Make the folder, or take up what lies there; the layers that are finished.

        Raises:
            WriteError: there is a result, or an interrupted run, and neither `overwrite` nor
                `resume` was asked for; or the interrupted run was of something else.
        """
        check_place(self.folder, resume=resume, overwrite=overwrite)
        if resume and self.path.is_dir():
            self._check_job()
            return self._finished()
        with os_errors(f"write {self.path}"):
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
        text = json.dumps(self._job, indent=2, sort_keys=True)
        write_file(self.path / JOB, text.encode())
        return {}

    def keep(self, layer: int, stats: LayerStats) -> None:
        """A layer is finished, its similarities included."""
        files.write_layer(self._file(layer), stats)

    def _file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"

    def _finished(self) -> dict[int, LayerStats]:
        found = {}
        for path in sorted(self.path.glob("layer-*.safetensors")):
            layer = int(path.stem.partition("-")[2])
            if not self.similarity or (self.path / file_of(layer)).is_file():
                found[layer] = files.read_layer(path)
        return found

    def _check_job(self) -> None:
        try:
            other = json.loads((self.path / JOB).read_bytes())
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"cannot read {self.path.name}/{JOB} ({e})", hint="Start again with --overwrite."
            ) from e
        mine = json.loads(json.dumps(self._job))
        names = sorted(mine.keys() | other.keys())
        problems = [
            f"{n}: then {other.get(n)}, now {mine.get(n)}"
            for n in names
            if mine.get(n) != other.get(n)
        ]
        if problems:
            raise WriteError(
                f"{self.path.name} is of another run, which this one cannot continue",
                problems=problems,
                hint="Give the same checkpoint, text and options, or start again with --overwrite.",
            )


def partial_of(folder: Path) -> Path:
    """Where a result is made before it comes to its place."""
    whole = folder.absolute()
    return whole.with_name(f"{whole.name}.partial")


def check_place(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Whether a result may be made there; asked before anything takes long.

    Raises:
        WriteError: something is there, and neither `overwrite` nor `resume` was asked for.
    """
    partial = partial_of(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not files.is_stats(folder):
            raise WriteError(
                f"{folder} is there, and holds something else than statistics",
                hint="Give another place.",
            )
        if not overwrite:
            raise WriteError(f"{folder} is there already", hint="Replace it with --overwrite.")
    done = len(list(partial.glob("layer-*.safetensors"))) if partial.is_dir() else 0
    if done and not resume and not overwrite:
        raise WriteError(
            f"a run into {folder.name} was interrupted after {done} layers",
            hint="Continue it with --resume, or start again with --overwrite.",
        )
