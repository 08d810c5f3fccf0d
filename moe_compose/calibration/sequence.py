"""Merging layer by layer, each measured behind the merged layers before it, as REAM does
(2604.04356).

Two models run in lockstep, one layer of each in memory. The merged one runs the text; before its
layer i exists, the original's layer i is given what the merged layers 0 to i − 1 made of it. What
its experts do there is measured, they are grouped and aligned, and the merged layer i is made, run
and forgotten. The text passes twice through each layer, whatever the number of layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_compose.calibration import similarity
from moe_compose.calibration.alignment import align
from moe_compose.calibration.calls import experts_in
from moe_compose.calibration.checks import check_layers
from moe_compose.calibration.grouping import group_experts
from moe_compose.calibration.observe import Observer, Subject
from moe_compose.calibration.options import CalibrateOptions
from moe_compose.calibration.record import Record, record_of
from moe_compose.calibration.sampling import sample_of
from moe_compose.calibration.stats import ExpertStats, LayerStats
from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import FLOAT_DTYPES, Extent, TensorSource, common_dtype
from moe_compose.runtime import Runner
from moe_compose.runtime.lockstep import Call
from moe_compose.runtime.single import filled
from moe_compose.surgery.groups import Grouping
from moe_compose.surgery.merge import any_grouping, check_merge_options, merge_grouped
from moe_compose.surgery.merge_options import MergeOptions
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.selection import moe_form


def merge_in_sequence(
    source: TensorSource,
    texts: Texts,
    options: MergeOptions,
    calibration: CalibrateOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Plan an MoE of merged experts, every layer measured behind the merged ones before it.

    Args:
        source: an MoE, not quantised.
        texts: as `calibrate` takes them.
        options: of the merging.
        calibration: of the measuring; similarities are gathered whatever it says.
        progress: told how many sparse layers of how many are merged.

    Returns:
        A checked plan, as `merge` gives it.

    Raises:
        OptionError, CheckpointError, UnsupportedError: as `merge` and `calibrate`.

    Example:
        >>> small = merge_in_sequence(moe, texts, MergeOptions(keep=4))  # doctest: +SKIP
    """
    options = check_merge_options(source, options)
    grouping, _ = group_in_sequence(source, texts, options, calibration, progress=progress)
    return merge_grouped(source, grouping, options)


def group_in_sequence(
    source: TensorSource,
    texts: Texts,
    options: MergeOptions,
    calibration: CalibrateOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Grouping, ExpertStats]:
    """The grouping that `merge_in_sequence` follows, and what was measured for it. Arguments and
    errors are the same.
    """
    options = check_merge_options(source, options)
    chosen = replace(calibration or CalibrateOptions(), similarity=True).check()
    tokens = tokens_of(source, texts, chosen)
    with tempfile.TemporaryDirectory(prefix="moe-compose-") as folder:
        run = _Sequence(source, tokens, options, chosen, Path(folder), progress)
        return run.through()


class _Growing:
    """A `TensorSource`: the plan as far as it is known. Shapes do not depend on the groups."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config, self.tensors = plan.config, plan.tensors
        self.files = plan.files
        self.weight_files, self.label = plan.weight_files, plan.label

    def digest(self) -> str:
        return self.plan.digest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return self.plan.extents(name)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        return self.plan.stream(name)

    def read(self, name: str) -> torch.Tensor:
        return self.plan.read(name)


class _Sequence:
    """One run."""

    def __init__(
        self,
        source: TensorSource,
        tokens: TokenSet,
        options: MergeOptions,
        chosen: CalibrateOptions,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._source, self._tokens, self._options = source, tokens, options
        self._chosen, self._folder, self._progress = chosen, folder, progress
        _, self._moe = moe_form(source)
        assert options.keep is not None
        self._known = any_grouping(self._moe, options)
        self._measured: dict[int, LayerStats] = {}
        self._growing = _Growing(merge_grouped(source, self._known, options))
        self._dtype = _dtype(source, chosen)
        self._original = Runner(source, **self._how())
        check_layers(self._original, self._moe, source, chosen)
        self._rows = tokens.batches(chosen.batch)
        sampled = min(chosen.sample, sum(tokens.tokens.values()))
        self._subject = Subject(
            rows=self._rows,
            domains=len(tokens.domains),
            moe=self._moe,
            sample=sample_of(self._rows, sampled, tokens.seed),
            sampled=sampled,
        )
        self._record = self._made_record()

    def through(self) -> tuple[Grouping, ExpertStats]:
        """All layers."""
        merged = Runner(self._growing, **self._how())
        merged.run([r.batch for r in self._rows], ahead=self._ahead)
        of = {**self._known.of, "in_sequence": True}
        note = "each layer was measured behind the merged ones before it"
        stats = ExpertStats(record=self._record, layers=self._measured)
        return replace(self._known, of=of, notes=(*self._known.notes, note)), stats

    def _ahead(self, index: int, calls: Iterator[tuple[int, Call]]) -> None:
        """Measure the original's layer on what the merged one is about to be given; group it."""
        if index not in self._moe.sparse_layers:
            return
        self._measured[index] = self._measure(index, calls)
        stats = ExpertStats(
            record=self._record, layers={index: self._measured[index]}, folder=self._folder
        )
        found = group_experts(stats, self._options, self._moe)
        by = self._options.aligned_by
        if by != "none":
            found = align(self._source, found, by, stats)
        (self._folder / similarity.file_of(index)).unlink()
        notes = (*self._known.notes, *(f"layer {index}: {note}" for note in found.notes))
        self._known = replace(
            found,
            layers={**self._known.layers, **found.layers},
            orders={**self._known.orders, **found.orders},
            notes=notes,
        )
        self._growing.plan = merge_grouped(self._source, self._known, self._options)
        if self._progress is not None:
            self._progress(len(self._measured), len(self._moe.sparse_layers))

    def _measure(self, index: int, calls: Iterator[tuple[int, Call]]) -> LayerStats:
        with filled(self._original, index) as layer:
            experts = experts_in(layer, self._moe)
            assert experts is not None
            observer = Observer(layer, experts, self._subject, lambda count: None)
            with observer.watching():
                for batch, call in calls:
                    layer.batch, layer.index_of_batch = self._rows[batch].batch, batch
                    layer.module(*call.args, **call.kwargs)
            layer.batch = None
            assert observer.inputs_SD is not None
            similarity.gather(
                layer.experts,
                self._moe.num_experts,
                observer.inputs_SD,
                observer.logits_SE,
                self._folder / similarity.file_of(index),
            )
            return observer.result()

    def _how(self) -> dict[str, Any]:
        device = self._chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return {"dtype": self._dtype, "device": device, "prefetch": False}

    def _made_record(self) -> Record:
        return record_of(
            self._source,
            self._tokens,
            top_k=self._moe.top_k,
            dtype=self._dtype,
            device=self._original.device.type,
            sample=self._subject.sampled,
        )


def _dtype(source: TensorSource, chosen: CalibrateOptions) -> str:
    if chosen.dtype is not None:
        return chosen.dtype
    on_cpu = chosen.device == "cpu" or not torch.cuda.is_available()
    return "float32" if on_cpu else FLOAT_DTYPES.get(common_dtype(source), "float32")
