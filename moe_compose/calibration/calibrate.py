"""`calibrate`: run text through a checkpoint, or a plan, and measure its experts.

One pass, layer by layer: all text goes through a layer before the next one is read, and what was
measured of a layer is finished, and on the disk, when the layer is left.

Inside of an initialised torch.distributed each process takes its part of the sequences, and every
layer's sums are added when it is left (`ranks.py`).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moe_compose.architectures import MoE
from moe_compose.calibration import files, similarity
from moe_compose.calibration.calls import experts_in
from moe_compose.calibration.checks import check_layers, moe_of
from moe_compose.calibration.leave_out import LeaveOut, router_of
from moe_compose.calibration.observe import Observer, Subject
from moe_compose.calibration.options import CalibrateOptions
from moe_compose.calibration.ranks import Ranks
from moe_compose.calibration.record import HALVES, PACKAGES, Record, record_of
from moe_compose.calibration.resume import Partial, check_place
from moe_compose.calibration.sampling import sample_of
from moe_compose.calibration.stats import ExpertStats, LayerStats
from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource, common_dtype
from moe_compose.errors import OptionError
from moe_compose.runtime import Layer, Runner
from moe_compose.version import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CalibrateProgress:
    """How far a calibration is.

    Attributes:
        done: tokens measured by this process, each layer counted.
        total: of how many.
        layer: the layer that runs.
        layers: decoder layers with experts.
    """

    done: int
    total: int
    layer: int
    layers: int


def calibrate(
    source: TensorSource,
    texts: Texts,
    options: CalibrateOptions | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[CalibrateProgress], None] | None = None,
) -> ExpertStats:
    """Measure what each expert does on text.

    Args:
        source: a checkpoint, or a plan that was never written.
        texts: documents, documents by domain, or what `read_domains` or `tokenise` gave.
        options: see `CalibrateOptions`; of a `TokenSet`, its own length, seed and size hold.
        output: folder for the result; without it nothing is written, and nothing can be resumed.
        resume: continue a run into `output` that was interrupted.
        overwrite: replace statistics that are there.
        progress: told after every batch.

    Returns:
        The statistics; the same bytes in `output` however often the run was interrupted. Among
        several processes all return the same; the first one writes, tells of progress, and draws
        the sample of similarities from its own part.

    Raises:
        OptionError: options or texts that cannot be meant; before the model is opened.
        UnsupportedError: a family whose experts cannot be watched; the reason is said.
        CheckpointError: tensors missing or of the wrong shape.
        WriteError: `output` is not free, or cannot be written.
        MoeComposeError: another process failed.

    Example:
        >>> stats = calibrate(moe, {"en": english, "py": python})  # doctest: +SKIP
        >>> stats.dead(3)                                          # doctest: +SKIP
        ()
    """
    ranks = Ranks()
    with ranks.together():
        options = (options or CalibrateOptions()).check()
        place = None if output is None else Path(output)
        if place is None and options.similarity:
            raise OptionError(
                "similarities take a folder: they are too large to be held",
                hint="Pass output=..., or leave similarity out.",
            )
        if place is not None and ranks.first:
            check_place(place, resume=resume, overwrite=overwrite)
        run = _prepare(source, texts, options, ranks)
        partial = None
        if place is not None and ranks.first:
            partial = Partial(place, run.job(), similarity=options.similarity)
            run.layers = partial.begin(resume=resume, overwrite=overwrite)
        run.layers = ranks.gather(run.layers)[0]
        run.through(partial, progress if ranks.first else None)
        return _kept(run, partial, ranks)


def _prepare(source: TensorSource, texts: Texts, options: CalibrateOptions, ranks: Ranks) -> _Run:
    """All that can go wrong before anything is read."""
    moe = moe_of(source)
    tokens = tokens_of(source, texts, options)
    device = options.device or ranks.device()
    dtype = options.dtype or _dtype(source, device)
    runner = Runner(source, dtype=dtype, device=device)
    check_layers(runner, moe, source, options)
    return _Run(source, moe, tokens, options, runner, dtype, ranks)


def _kept(run: _Run, partial: Partial | None, ranks: Ranks) -> ExpertStats:
    """What was measured, brought to its place by the first process."""
    layers = dict(sorted(run.layers.items()))
    alike = {similarity.file_of(i) for i in layers} if partial and partial.similarity else set()
    size = sum((partial.path / name).stat().st_size for name in alike) if partial else 0
    record = ranks.gather(run.record(size) if ranks.first else None)[0]
    assert record is not None
    stats = ExpertStats(record=record, layers=layers)
    if partial is None:
        return stats
    files.write_tables(stats, partial.path)
    files.finish(partial.path, partial.folder, {files.TABLES, files.RECORD, *alike})
    return files.load(partial.folder)


class _Run:
    """One calibration, and the layers that are finished."""

    def __init__(
        self,
        source: TensorSource,
        moe: MoE,
        tokens: TokenSet,
        options: CalibrateOptions,
        runner: Runner,
        dtype: str,
        ranks: Ranks,
    ) -> None:
        self._source, self._moe, self._tokens = source, moe, tokens
        self._options, self._runner, self._dtype = options, runner, dtype
        self._ranks = ranks
        self._part = tokens.part(ranks.rank, ranks.size) if ranks.size > 1 else tokens
        self._rows = self._part.batches(options.batch)
        wanted = options.sample if options.similarity and ranks.first else 0
        self._sampled = min(wanted, sum(self._part.tokens.values()))
        wanted = options.loo_tokens if ranks.first else 0
        self._masked = min(wanted, sum(self._part.tokens.values()))
        self.layers: dict[int, LayerStats] = {}

    def job(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        stats = [path.stat() for path in self._source.weight_files]
        return {
            "checkpoint": self._source.digest(),
            "weights": [[s.st_size, s.st_mtime_ns] for s in stats],
            "text": self._tokens.digest(),
            "batch": self._options.batch,
            "processes": self._ranks.size,
            "dtype": self._dtype,
            "device": self._runner.device.type,
            "sample": self._sampled,
            "loo_tokens": self._masked,
            "seed": self._tokens.seed,
            "versions": versions(*PACKAGES),
        }

    def record(self, sample_bytes: int = 0) -> Record:
        """What was measured on what."""
        unread = [i for i, s in sorted(self.layers.items()) if s.logit_E is None]
        notes = [f"the routers of layers {unread} could not be read: no entropy"] if unread else []
        if unused := self._runner.unused:
            notes.append(f"{len(unused)} tensors that the class does not run, from {unused[0]} on")
        return record_of(
            self._source,
            self._tokens,
            top_k=self._moe.top_k,
            dtype=self._dtype,
            device=self._runner.device.type,
            sample=self._sampled,
            sample_bytes=sample_bytes,
            loo_tokens=self._masked,
            notes=tuple(notes),
        )

    def through(
        self, partial: Partial | None, progress: Callable[[CalibrateProgress], None] | None
    ) -> None:
        """Stream all text through all layers that are left to measure."""
        found = {x.index: experts_in(x, self._moe) for x in self._runner.layers}
        sparse = {i: module for i, module in found.items() if module is not None}
        if not set(sparse) - self.layers.keys():
            return
        subject = Subject(
            rows=self._rows,
            domains=len(self._tokens.domains),
            moe=self._moe,
            sample=sample_of(self._rows, self._sampled, self._tokens.seed),
            sampled=self._sampled,
        )
        masked = sample_of(self._rows, self._masked, self._tokens.seed)
        each = sum(self._part.tokens.values())
        done = each * len(self.layers)

        def tick(count: int, layer: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(CalibrateProgress(done, each * len(sparse), layer, len(sparse)))

        @contextmanager
        def measured(layer: Layer) -> Iterator[None]:
            experts = sparse[layer.index]
            observer = Observer(
                layer,
                experts,
                subject,
                lambda count: tick(count, layer.index),
                self._leave_out(layer.index, experts, masked) if self._masked else None,
            )
            with observer.watching():
                yield
            self._finish(layer, observer, partial)

        def on_layer(layer: Layer) -> AbstractContextManager[None] | None:
            left = layer.index in sparse and layer.index not in self.layers
            return measured(layer) if left else None

        self._runner.run([r.batch for r in self._rows], on_layer=on_layer)

    def _leave_out(
        self, layer: int, experts: nn.Module, sample: Mapping[int, tuple[Tensor, Tensor]]
    ) -> LeaveOut:
        groups = HALVES * len(self._tokens.domains)
        return LeaveOut(layer, experts, router_of(self._source, layer), sample, groups)

    def _finish(self, layer: Layer, observer: Observer, partial: Partial | None) -> None:
        """A layer is about to be left: its similarities, then everybody's sums, which say it is
        done.
        """
        own = observer.result()
        if self._sampled and partial is not None and observer.inputs_SD is not None:
            path = partial.path / similarity.file_of(layer.index)
            experts = self._moe.num_experts
            similarity.gather(layer.experts, experts, observer.inputs_SD, observer.logits_SE, path)
        found = reduce(operator.add, self._ranks.gather(own))
        if partial is not None:
            partial.keep(layer.index, found)
        self.layers[layer.index] = found


def _dtype(source: TensorSource, device: str) -> str:
    own = FLOAT_DTYPES.get(common_dtype(source), "float32")
    return "float32" if device == "cpu" else own
