"""Where a recipe stands, and whoever watches it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.errors import OptionError

if TYPE_CHECKING:
    from moe_compose.calibration.options import CalibrateOptions
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.checkpoint.writer import Progress
    from moe_compose.surgery.donors import Donor
    from moe_compose.surgery.plan import Plan
    from moe_compose.validation.report import ValidationReport

#: Told how much is done, and how much there is.
Count = Callable[[int, int], None]

#: How a recipe calls the result of an earlier step.
_RESULT = re.compile(r"steps\.(\d+)")


def place_of(path: str | Path) -> str:
    """One name for a folder or file, however it is called."""
    return str(Path(path).expanduser().absolute())


@dataclass(frozen=True, kw_only=True)
class Written:
    """A result on disk.

    Attributes:
        step: its index.
        folder: where it is.
        checkpoint: what was written.
        report: of its validation; None: it was not validated.
        pushed: its address on the Hub; empty: it was not pushed.
    """

    step: int
    folder: Path
    checkpoint: Checkpoint
    report: ValidationReport | None
    pushed: str = ""


class Watch:
    """Is told how a run goes. This one keeps it to itself; a subclass shows what it likes."""

    def begins(self, step: int, operation: str) -> None:
        """A step begins."""

    def planned(self, step: int, plan: Plan) -> None:
        """Its plan is there; nothing is written."""

    def holds(self, step: int, said: str) -> None:
        """Its conditions were measured, and hold."""

    def found(self, step: int, operation: str, result: Any) -> None:
        """It measured something, or wrote something that is no checkpoint."""

    def written(self, done: Written) -> None:
        """A result is on the disk, and validated if it was to be."""

    def remark(self, text: str) -> None:
        """Something worth a line."""

    @contextmanager
    def counting(self, what: str, unit: str = "bytes") -> Iterator[Count | None]:
        """Something takes long, and tells how far it is."""
        yield None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something takes a while."""
        yield


@dataclass
class State:
    """Where a recipe stands.

    Attributes:
        dry: names and sizes only: no weight is read and nothing is measured or written.
        alone: the step is a command of its own: even dry it may read weights, where these and
            statistics that are there tell the plan.
        resume: go on with what an interrupted run left.
        overwrite: replace what is there.
        watch: is told.
        headers_only: of models on the Hub only headers are fetched.
        folder: of the step under way, for what it can resume from; None: it keeps nothing.
        model: the last result.
        saved: it is written, or in a dry run would be.
        before: what the last operation started from.
        stats: of the last calibration; of a dry one there are none.
        measuring: options of the last calibration.
        measured: digest of the model that it measured.
        results: of each step that is done, what the next one starts from.
        promised: in a dry run, folder → the model that a step will write there; None: something
            else.
        opened: checkpoints, by how they were called.
    """

    dry: bool = False
    alone: bool = False
    resume: bool = False
    overwrite: bool = False
    watch: Watch = field(default_factory=Watch)
    headers_only: bool = False
    folder: Path | None = None
    model: TensorSource | None = None
    saved: bool = False
    before: TensorSource | None = None
    stats: ExpertStats | None = None
    measuring: CalibrateOptions | None = None
    measured: str = ""
    results: list[TensorSource | None] = field(default_factory=list)
    promised: dict[str, TensorSource | None] = field(default_factory=dict)
    opened: dict[str, TensorSource] = field(default_factory=dict)

    def open(self, name: str) -> TensorSource:
        """A checkpoint by its path or its name on the Hub, opened once; or `steps.N`, what an
        earlier step made.

        Raises:
            OptionError: there is no such step, or it made no model.
            CheckpointError: there is no such checkpoint, or a damaged one.
        """
        from moe_compose.checkpoint.reader import Checkpoint

        if found := _RESULT.fullmatch(name):
            return self._result(int(found[1]))
        if (coming := self.promised.get(place_of(name))) is not None:
            return coming
        if name not in self.opened:
            self.opened[name] = Checkpoint.open(name, headers_only=self.dry or self.headers_only)
        return self.opened[name]

    def _result(self, index: int) -> TensorSource:
        found = self.results[index] if index < len(self.results) else None
        if found is None:
            done = ", ".join(f"steps.{i}" for i, r in enumerate(self.results) if r is not None)
            raise OptionError(
                f"steps.{index} is no earlier step that made a model",
                hint=f"There are {done}." if done else "",
            )
        return found

    def source(self, given: Mapping[str, Any]) -> TensorSource:
        """What a step starts from: its own source, or the last result."""
        if "source" in given:
            return self.open(given["source"])
        if self.model is None:
            raise OptionError("the first step needs a source (source: FOLDER)")
        return self.model

    def donor(self, text: str) -> Donor:
        """Where an expert comes from."""
        from moe_compose.surgery.donors import Donor

        return Donor.parse(text, self.open)

    def measures(self, given: Mapping[str, Any]) -> bool:
        """Whether a step has statistics, its own or those of a calibration before it."""
        return "stats" in given or self.measuring is not None

    def statistics(self, given: Mapping[str, Any], source: TensorSource) -> ExpertStats | None:
        """A step's own statistics, held to the model's routers, or those of the last calibration;
        None where there are none, or none yet.

        Raises:
            OptionError: the last calibration measured another model.
            CheckpointError: the statistics are of another model, or damaged.
        """
        from moe_compose.calibration.pruning import check_statistics

        path = given.get("stats")
        if path is None:
            if self.measuring is not None and self.measured != source.digest():
                raise OptionError(
                    "the last calibrate step measured another model than the one that this step "
                    "starts from",
                    hint="Calibrate that one, or say where this step starts: source: steps.N.",
                )
            if self.stats is not None:
                check_statistics(self.stats, source)
            return self.stats
        if place_of(path) in self.promised:
            return None
        from moe_compose.calibration.stats import ExpertStats

        found = ExpertStats.load(path)
        check_statistics(found, source)
        return found

    @contextmanager
    def writing(self, folder: Path) -> Iterator[Callable[[Progress], None] | None]:
        """A folder is written, and tells how many bytes are."""
        with self.watch.counting(f"writing {folder.name}") as count:
            yield count and (lambda p: count(p.bytes_done, p.bytes_total))

    @contextmanager
    def layers(self, what: str) -> Iterator[Count | None]:
        """Something is done layer by layer."""
        with self.watch.counting(what, "layers") as count:
            yield count
