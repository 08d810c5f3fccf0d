"""`measure`: what routers are given on each expert's text.

One pass over all text, a layer in memory at a time. Every batch holds text of one expert, and that
expert is forced in all layers, so what is measured of it depends on no other one's text or rows
(where the k weights of a token do not sum to a constant, their sum is the router's own, and on that
it does depend). Batches of an expert follow one another: besides the layer there is one sum in
memory, D² · 8 bytes whatever the number of experts, and as much again while it is written.

Shape suffixes: T tokens of a batch, D what the router is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.architectures.parts import Locator
from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.calibration.tokens import Rows, TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.blocks import StatsFile, packed, second_name, sum_name
from moe_compose.composition.forcing import Routers, forced, router_inputs
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.statistics import (
    STATS_NAME,
    ExpertText,
    RouterStats,
)
from moe_compose.errors import CheckpointError, OptionError, UnsupportedError
from moe_compose.runtime import Layer, Runner
from moe_compose.surgery.expert_names import index_of, names_of
from moe_compose.surgery.roles import Roles

#: Tells how far it is: layers done, layers in all.
Progress = Callable[[int, int], None]


def measure(
    source: TensorSource,
    texts: Mapping[Any, Texts],
    options: RoutingOptions | None = None,
    *,
    folder: str | Path,
    progress: Progress | None = None,
) -> RouterStats:
    """Sum up what routers are given on each expert's text, that expert forced in every MoE layer.

    Args:
        source: an MoE, or a plan of one; its router's rows do not matter, unless the family lets
            the k weights sum to anything.
        texts: expert, by index or name → its text. Experts may be without.
        options: how much text, and how it is run; `method`, `ridge` and
            `row_scale` go into the record.
        folder: where `router_stats.safetensors` is written, in one step.
        progress: told after every layer.

    Returns:
        The statistics, on the disk.

    Raises:
        OptionError: experts that are not there, or text that cannot be run.
        UnsupportedError: a family whose experts cannot be forced.
        CheckpointError: the model computes what is no number.

    Example:
        >>> stats = measure(moe, {"py": python, "de": german}, folder="out/")  # doctest: +SKIP
        >>> rows = solve(stats)                                      # doctest: +SKIP
        >>> mc.write(with_rows(moe, rows), "routed/")                # doctest: +SKIP
    """
    options = options or RoutingOptions()
    routers = Routers.of(source)
    count = routers.moe.num_experts
    indices = indices_of(source, texts, count)
    known = [n or str(i) for i, n in enumerate(names_of(source.config, count))]
    runner = Runner(source, dtype=options.dtype, device=options.device)
    routers.check_experts(runner)
    matrices = routers.matrices(runner)
    tokens = {i: tokens_of(source, texts[key], options) for i, key in indices.items()}
    stats = RouterStats(
        experts=tuple(_text_of(name, tokens.get(i), options) for i, name in enumerate(known)),
        widths=routers.widths,
        method=options.method,
        ridge=options.ridge,
        shared=shared_digest(source, routers),
        dtype=options.dtype,
        blocks={},
    )
    path = Path(folder) / STATS_NAME
    with stats.file(path) as file:
        _Run(routers, matrices, known, tokens, options.batch, file, progress).through(runner)
    return RouterStats.load(path)


def indices_of(source: TensorSource, texts: Mapping[Any, Any], experts: int) -> dict[int, Any]:
    """Index of an expert → its key in `texts`, ascending.

    Raises:
        OptionError: experts that are not there, given twice, or none; all faults at once.
    """
    found: dict[int, Any] = {}
    problems = [] if texts else ["no expert has text"]
    for key in texts:
        try:
            index = index_of(source.config, experts, key)
        except OptionError as e:
            problems.append(e.message)
            continue
        if index in found:
            problems.append(f"expert {index} has text twice ({found[index]!r} and {key!r})")
        found[index] = key
    if problems:
        raise OptionError(f"this text is not for the experts of {source.label}", problems=problems)
    return dict(sorted(found.items()))


def shared_digest(source: TensorSource, routers: Routers) -> str:
    """Hex SHA-256 of all tensors but experts and routers: what sums of different experts have in
    common. Reads them.
    """
    roles = Roles(routers.form)
    locate = Locator(routers.form, routers.form.layers.integer(source.config))
    h = hashlib.sha256()
    for name in sorted(source.tensors):
        if roles.of(name) is None and locate.place(name).kind != "MTP":
            h.update(f"\0{name}\0".encode())
            for piece in source.stream(name):
                h.update(piece.contiguous().flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _text_of(name: str, tokens: TokenSet | None, options: RoutingOptions) -> ExpertText:
    scale = options.row_scale or 1.0
    if tokens is None:
        return ExpertText(name=name, scale=scale)
    files = tuple(file for domain in tokens.files for file in domain)
    count = sum(tokens.tokens.values())
    return ExpertText(name=name, scale=scale, tokens=count, text=tokens.digest(), files=files)


class _Run:
    """One measurement."""

    def __init__(
        self,
        routers: Routers,
        matrices: Mapping[int, nn.Module],
        names: Sequence[str],
        tokens: Mapping[int, TokenSet],
        batch: int,
        file: StatsFile,
        progress: Progress | None,
    ) -> None:
        self._routers, self._matrices, self._names = routers, matrices, names
        self._file, self._progress = file, progress
        self._rows: list[Rows] = []
        self._experts: list[int] = []
        for expert, own in tokens.items():
            rows = own.batches(batch)
            self._rows += rows
            self._experts += [expert] * len(rows)

    def through(self, runner: Runner) -> None:
        """Run all text."""
        done = 0

        @contextmanager
        def measured(layer: Layer) -> Iterator[None]:
            nonlocal done
            sums = _Sums(layer, self)
            width = self._routers.widths[layer.index]
            matrix = self._matrices[layer.index]
            with (
                forced(layer, self._experts, self._routers.moe),
                router_inputs(layer, matrix, width, sums.add),
            ):
                yield
            sums.check()
            done += 1
            if self._progress is not None:
                self._progress(done, len(self._matrices))

        def on_layer(layer: Layer) -> AbstractContextManager[None] | None:
            return measured(layer) if layer.index in self._matrices else None

        runner.run([r.batch for r in self._rows], on_layer=on_layer)

    def real(self, batch: int) -> Tensor:
        """Which of a batch's tokens are no padding, bool `[T]`."""
        return self._rows[batch].real.flatten()

    def ends(self, batch: int) -> bool:
        """Whether a batch is the last one of its expert."""
        return batch + 1 == len(self._experts) or self._experts[batch + 1] != self._experts[batch]

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self._rows)

    def put(self, layer: int, batch: int, second_DD: Tensor, sum_D: Tensor) -> None:
        """The sums of a batch's expert are whole.

        Raises:
            CheckpointError: they are no numbers.
        """
        name = self._names[self._experts[batch]]
        if not bool(second_DD.isfinite().all()):
            raise CheckpointError(
                f"layer {layer} computes NaN or infinite values on the text of expert {name}",
                hint="moe-compose validate names bad tensors; or compute with dtype=float32.",
            )
        self._file.put(second_name(layer, name), packed(second_DD))
        self._file.put(sum_name(layer, name), sum_D)


class _Sums:
    """One layer's sums, of the expert whose batches run now."""

    def __init__(self, layer: Layer, run: _Run) -> None:
        self._layer, self._run = layer, run
        self._seen = 0
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, x_TD: Tensor) -> None:
        """Add a batch; the last one of an expert is followed by the writing of its sums.

        Raises:
            UnsupportedError: the router is not given every token of a batch.
        """
        batch = self._layer.index_of_batch
        real_T = self._run.real(batch).to(x_TD.device)
        if len(x_TD) != len(real_T) or batch != self._seen:
            raise UnsupportedError(
                f"layer {self._layer.index} gives its router {len(x_TD)} tokens of a batch of "
                f"{len(real_T)}: its text cannot be told by expert"
            )
        x_TD = x_TD[real_T].double()
        if self._sums is None:
            width = x_TD.shape[-1]
            self._sums = x_TD.new_zeros(width, width), x_TD.new_zeros(width)
        second_DD, sum_D = self._sums
        second_DD.addmm_(x_TD.T, x_TD)
        sum_D.add_(x_TD.sum(0))
        self._seen += 1
        if self._run.ends(batch):
            self._run.put(self._layer.index, batch, second_DD, sum_D)
            self._sums = None

    def check(self) -> None:
        """Hold the layer to having seen all batches.

        Raises:
            UnsupportedError: some never reached the router.
        """
        if self._seen != self._run.batches:
            raise UnsupportedError(
                f"layer {self._layer.index} called its router on {self._seen} of "
                f"{self._run.batches} batches"
            )
