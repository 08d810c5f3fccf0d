"""Where the down-projections of a layer's experts lie on disk, and how changes get into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compose.architectures.parts import layout_of
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.selection import moe_form


@dataclass(frozen=True, slots=True)
class Home:
    """One expert's W_d.

    Attributes:
        name: the tensor.
        rows: its rows along the first dimension; None: the tensor is all its own.
        transposed: stored `[F, D]`.
    """

    name: str
    rows: range | None
    transposed: bool


@dataclass(frozen=True, eq=False)
class New:
    """A layer's changed tensors, rounded to how they are stored.

    Attributes:
        tensors: by name.
        rows: of stacked tensors, which ones.
        changes: expert → what its W_d really changed by, fp64 `[D, F]`.
    """

    tensors: Mapping[str, Tensor]
    rows: Mapping[str, tuple[int, ...]]
    changes: Mapping[int, Tensor]


class Homes:
    """The down-projections of a checkpoint or plan.

    Raises:
        UnsupportedError: they are quantised, or not stored as matrices.
    """

    def __init__(self, source: TensorSource) -> None:
        form, self.moe = moe_form(source)
        form = layout_of(form, source.tensors)
        assert form.experts is not None
        self._matrices, self._source = form.experts, source
        if problems := list(self._problems()):
            raise UnsupportedError(
                f"the down-projections of {source.label} cannot be refitted",
                problems=problems[:5],
                hint="Refit a checkpoint in bf16 or fp32, and quantise the result.",
            )

    def of(self, layer: int, expert: int) -> Home:
        """Where an expert's matrix lies."""
        m = self._matrices
        name = m.down.format(i=layer, e=expert)
        if not m.stacked:
            return Home(name, None, m.transposed)
        each = self._source.tensors[name].shape[0] // self.moe.num_experts if m.flat else 1
        rows = range(expert * each, (expert + 1) * each)
        return Home(name, rows, m.flat or m.transposed)

    def changed(self, layer: int, changes: Mapping[int, Tensor]) -> New:
        """Add changes to what is stored, and round once.

        Args:
            layer: which layer.
            changes: expert → `[D, F]`, fp64.
        """
        tensors: dict[str, list[Tensor]] = {}
        rows: dict[str, tuple[int, ...]] = {}
        real: dict[int, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for expert, delta_DF in sorted(changes.items()):
            home = self.of(layer, expert)
            if home.name not in whole:
                whole = {home.name: self._source.read(home.name)}
            old = whole[home.name]
            if home.rows is not None:
                old = old[home.rows.start : home.rows.stop]
            shown = delta_DF.T if home.transposed else delta_DF
            new = (old.double() + shown.cpu().reshape(old.shape)).to(old.dtype)
            moved = (new.double() - old.double()).reshape(shown.shape).to(delta_DF.device)
            real[expert] = moved.T if home.transposed else moved
            tensors.setdefault(home.name, []).append(new)
            if home.rows is not None:
                rows[home.name] = (*rows.get(home.name, ()), *home.rows)
        joined = {n: torch.cat(parts) if n in rows else parts[0] for n, parts in tensors.items()}
        return New(joined, rows, real)

    def _problems(self) -> Iterator[str]:
        for layer in self.moe.sparse_layers:
            for name in dict.fromkeys(self._names(layer)):
                info = self._source.tensors.get(name)
                if info is None:
                    yield f"{name} is not there: it is packed, or stored under another name"
                elif info.dtype not in FLOAT_DTYPES:
                    yield f"{name} is quantised ({info.dtype}): a change would be rounded away"

    def _names(self, layer: int) -> Iterator[str]:
        """Names of a layer's tensors, whether they are there or not."""
        for expert in range(self.moe.num_experts):
            yield self._matrices.down.format(i=layer, e=expert)
