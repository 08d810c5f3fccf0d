"""LoRA adapters, as PEFT saves them, added to weights.

An adapter changes a weight `W [out, in]` of the model it was trained on to `W + s·B A`, with
`A [r, in]`, `B [out, r]`, and `s = alpha/r` (LoRA, arXiv 2106.09685) or `alpha/√r` (rsLoRA, arXiv
2312.03732). What changes anything else of a model has no place in one expert, and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import Architecture
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import FLOAT_DTYPES, Extent, TensorInfo
from moe_compose.errors import CheckpointError, PlanError, UnsupportedError
from moe_compose.surgery.adapter_folder import CONFIG_NAME, beyond_lora, pairs, read_adapter
from moe_compose.surgery.transforms import Read, Spec, Transform

if TYPE_CHECKING:
    import torch

#: Rows of a weight that are computed at a time.
_ROWS = 64


def is_adapter(folder: Path) -> bool:
    """Whether this is the folder of an adapter."""
    return (folder / CONFIG_NAME).is_file()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Adapter:
    """A LoRA adapter: a `TensorSource` of its A and B. Made by `Adapter.open`.

    Attributes:
        label: the folder's name, or the Hub id.
        config: `adapter_config.json` as it is.
        tensors: as they are named in the file.
        files: none: nothing of it travels along.
        weight_files: the one file.
        modules: module (`model.layers.3.mlp.up_proj`) → its A and B.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    weight_files: tuple[Path, ...]
    modules: Mapping[str, tuple[TensorInfo, TensorInfo]]
    _stored: Checkpoint

    @classmethod
    def open(cls, path_or_id: str | Path) -> Adapter:
        """Open an adapter: a folder, or `org/name@revision` on the Hub, which is downloaded. Reads
        the config and the header, no weights.

        Raises:
            CheckpointError: missing, damaged, or with A and B that do not belong together.
            UnsupportedError: more than a LoRA on linear layers; everything in the way at once.
        """
        stored = read_adapter(path_or_id)
        modules, problems = pairs(stored)
        if problems := [*beyond_lora(stored.config), *problems]:
            raise UnsupportedError(
                f"{stored.label} is not a LoRA that can be added to a model's weights",
                problems=problems,
                hint="Merge it with PEFT, and give the whole model.",
            )
        found = cls(
            stored.label, stored.config, stored.tensors, {}, stored.weight_files, modules, stored
        )
        if problems := list(found._malformed()):
            raise CheckpointError(f"{stored.label} is damaged", problems=problems)
        return found

    def digest(self) -> str:
        return self._stored.digest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return self._stored.extents(name)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        return self._stored.stream(name)

    def read(self, name: str) -> torch.Tensor:
        return self._stored.read(name)

    def applied(self, name: str, weight: Transform, key: str) -> Transform:
        """A weight with the adapter on it, in fp32 (fp64); the weight itself where it is untouched.

        Args:
            name: the weight's tensor in its checkpoint, `model.layers.3.mlp.up_proj.weight`.
            weight: its values, `[out, in]` (`[in, out]` with `fan_in_fan_out`).
            key: the plan's word for the adapter.

        Raises:
            CheckpointError: A and B do not fit it.
        """
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return weight
        a, b = self.modules[module]
        flipped = bool(self.config.get("fan_in_fan_out"))
        fits = (b.shape[0], a.shape[1])
        if weight.spec.shape != (fits[::-1] if flipped else fits):
            raise CheckpointError(
                f"{self.label} does not fit: {module} has shape {list(weight.spec.shape)}, "
                f"the adapter's B A {list(fits)}",
                hint="An adapter goes on the model it was trained on.",
            )
        return LowRank(weight, Read(key, b), Read(key, a), self.scaling(module), flipped)

    def scaling(self, module: str) -> float:
        """s: alpha/r, or alpha/√r, of one module."""
        rank, alpha = self._rank(module), self._by_pattern("alpha", module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def others(self, form: Architecture) -> tuple[str, ...]:
        """The touched modules that are no matrix of an FFN, shared or routed, of this family."""
        lies = (form.mlp, form.experts, form.shared.matrices if form.shared else None)
        ffn = [_pattern(name) for lie in lies if lie is not None for name in lie.names]
        return tuple(m for m in self.modules if not any(p.fullmatch(f"{m}.weight") for p in ffn))

    def missing(self, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
        """The touched modules that a checkpoint of these tensors does not have."""
        return tuple(m for m in self.modules if f"{m}.weight" not in tensors)

    def _rank(self, module: str) -> int:
        return int(self._by_pattern("rank", module))

    def _by_pattern(self, what: str, module: str) -> float:
        """An entry for all modules, or the first of those patterns that ends a module's name."""
        whole = {"rank": ("r", 8), "alpha": ("lora_alpha", 8)}[what]
        found = self.config.get(f"{what}_pattern") or {}
        for pattern, value in found.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.config.get(*whole))

    def _malformed(self) -> Iterator[str]:
        """Ranks that the config does not state, numbers that are none."""
        for module, (a, b) in self.modules.items():
            try:
                rank, scaling = self._rank(module), self.scaling(module)
            except (TypeError, ValueError, ZeroDivisionError, AttributeError, re.error) as error:
                yield f"{CONFIG_NAME}: no rank and alpha for {module} ({error})"
                return
            if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
                yield (
                    f"{module}: A {list(a.shape)} and B {list(b.shape)} should be "
                    f"[{rank}, in] and [out, {rank}]"
                )
            if not math.isfinite(scaling):
                yield f"{module}: alpha / rank ({scaling}) must be a finite number"


@dataclass(frozen=True)
class LowRank(Transform):
    """`x + scaling · b a`; transposed first, where weights are stored `[in, out]`.

    In fp64, rank after rank, which no number of threads changes; rounded to fp32 once.
    """

    x: Transform
    b: Transform
    a: Transform
    scaling: float
    transposed: bool = False

    @property
    def inputs(self) -> tuple[Transform, ...]:
        return (self.x, self.b, self.a)

    @property
    def spec(self) -> Spec:
        dtypes = {x.spec.dtype for x in self.inputs}
        if wrong := sorted(dtypes - set(FLOAT_DTYPES)):
            raise PlanError(f"no LoRA on dtype {', '.join(wrong)} ({self}): dequantise first")
        return Spec.of("F64" if "F64" in dtypes else "F32", self.x.spec.shape)

    def apply(self, *values: torch.Tensor) -> torch.Tensor:
        import torch

        x, b, a = values
        wide = any(v.dtype == torch.float64 for v in values)
        out = x.to(torch.float64 if wide else torch.float32, copy=True)
        if out.is_meta:
            return out
        left, right = (a.T, b.T) if self.transposed else (b, a)
        columns, rows = left.double(), right.double()
        for at in range(0, len(out), _ROWS):
            block, factors = out[at : at + _ROWS], columns[at : at + _ROWS]
            change = torch.zeros(block.shape, dtype=torch.float64)
            for factor, row in zip(factors.T, rows, strict=True):
                change.addcmul_(factor[:, None], row)
            block.copy_(change.mul_(self.scaling).add_(block))
        return out

    def __str__(self) -> str:
        return f"{self.x} + {self.scaling:g}·{self.b} · {self.a}"


def _pattern(template: str) -> re.Pattern[str]:
    """What matches a template's names, for every layer and expert."""
    return re.compile(re.escape(template).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+"))
