"""A dense checkpoint as a plan rounds it: the reference of a comparison that is to stay sharp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import find
from moe_compose.checkpoint.source import FLOAT_DTYPES, Extent, TensorInfo, TensorSource
from moe_compose.surgery.plan import Rounding
from moe_compose.surgery.shared_tensors import layer_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rounded:
    """A `TensorSource` whose weights are `round(f·W) / f` in fp32.

    Attributes:
        source: a dense checkpoint.
        rounding: the plan's.
    """

    source: TensorSource
    rounding: Rounding

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo.of(name, "F32", info.shape) if info.dtype in FLOAT_DTYPES else info
            for name, info in self.source.tensors.items()
        }

    @property
    def files(self) -> Mapping[str, Path]:
        return self.source.files

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self.source.weight_files

    @property
    def label(self) -> str:
        return self.source.label

    def digest(self) -> str:
        """That of the source: nothing here is kept by it."""
        return self.source.digest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        """None: values are computed."""
        return None

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in one piece."""
        yield self.read(name).flatten()

    def read(self, name: str) -> torch.Tensor:
        """The tensor, rounded, in fp32; one that is not of floats as it is."""
        value = self.source.read(name)
        if self.source.tensors[name].dtype not in FLOAT_DTYPES:
            return value
        value = value.float()
        for part, factor in self._parts(name, value):
            part.copy_((part * factor).to(self._dtype).float() / factor)
        return value

    @cached_property
    def _dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.rounding.dtype)
        return found

    def _parts(self, name: str, value: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        """Views of a tensor, and what each is multiplied by before it is rounded."""
        form = find(self.config)
        mlp, rounding = (form.of(self.config).mlp if form else None), self.rounding
        if mlp and mlp.down and layer_of(mlp.down, name) is not None:
            return [(value, rounding.down)]
        if mlp and mlp.up and layer_of(mlp.up, name) is not None:
            return [(value, rounding.up)]
        if mlp and mlp.gate_up and layer_of(mlp.gate_up, name) is not None:
            rows = len(value) // 2
            return [(value[:rows], 1.0), (value[rows:], rounding.up)]
        return [(value, 1.0)] if rounding.everything else []
