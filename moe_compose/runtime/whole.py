"""A model that is whole in memory, to be trained, and the way of its tensors back to the disk.

transformers turns tensors on disk into those of a class by conversions that move elements: experts
are stacked, halves joined, axes swapped. Which element goes where is asked of the conversion: it is
run once on element numbers in place of values. So the way back needs no second set of rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource, torch_dtype
from moe_compose.errors import UnsupportedError
from moe_compose.kernels import hook
from moe_compose.runtime.compat import Job
from moe_compose.runtime.runner import Runner


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Values on their way to the disk.

    Attributes:
        tensors: by name on disk, in the dtype they have there.
        rows: of those that stand for some rows only, which ones.
    """

    tensors: Mapping[str, Tensor]
    rows: Mapping[str, tuple[int, ...]]


class Whole:
    """A checkpoint or plan as a model in memory; nothing of it requires gradients.

    Args:
        source: quantised ones are dequantised.
        dtype: what to compute in.
        device: where.

    Attributes:
        model: transformers' own class, in evaluation mode.
        layers: its decoder layers, as observers see them.

    Raises:
        UnsupportedError, CheckpointError: as `Runner`.
    """

    def __init__(
        self, source: TensorSource, *, dtype: str, device: str | torch.device = "cpu"
    ) -> None:
        runner = Runner(source, dtype=dtype, device=device, experts=hook.NAME, prefetch=False)
        self._take(source, runner)
        skeleton = runner._skeleton
        for names in (*skeleton.of_layer, *skeleton.outside.values()):
            runner._fill(self._loader.load(names))
        self._tie()

    @classmethod
    def streamed(cls, source: TensorSource, runner: Runner) -> Whole:
        """The model of a runner: of its tensors, those that are filled at the time are there."""
        found = cls.__new__(cls)
        found._take(source, runner)
        return found

    def target_of(self, name: str) -> str | None:
        """The name in memory of what a tensor on disk goes into; None where there is none."""
        return self._loader.target_of(name)

    def made_of(self, name: str) -> tuple[str, ...]:
        """The names on disk of what goes into a tensor in memory."""
        return tuple(on_disk for on_disk, _ in self._loader._made_by[name][0].sources)

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and stored buffers, by name in memory; tied ones once."""
        stored = self._loader.sizes
        found: dict[str, Tensor] = dict(self.model.named_parameters())
        found |= {n: b for n, b in self.model.named_buffers() if n in stored}
        return {n: t for n, t in found.items() if not t.is_meta}

    def exact(self, name: str) -> Tensor:
        """A tensor's values as they are on disk, widened to fp32 (fp64 stays), on the CPU."""
        job, made_as = self._loader._made_by[name]

        def read(on_disk: str) -> Tensor:
            value = self._source.read(on_disk)
            return value if value.dtype == torch.float64 else value.float()

        return job.run(self.model, read)[made_as]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor in memory has on disk.

        Raises:
            UnsupportedError: it is quantised there, or several dtypes meet in it.
        """
        job, _ = self._loader._made_by[name]
        infos = [self._source.tensors.get(n) for n, _ in job.sources]
        found = {info.dtype if info else "packed" for info in infos}
        if len(found) > 1 or not found <= FLOAT_DTYPES.keys():
            raise UnsupportedError(
                f"{name} cannot be trained: it is stored as {', '.join(sorted(found))}",
                hint="Train a checkpoint in bf16 or fp32, and quantise the result.",
            )
        return torch_dtype(found.pop())

    def stored(
        self, values: Mapping[str, Tensor], rows: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Stored]:
        """Values in memory as tensors on disk, one conversion's at a time.

        Args:
            values: name in memory → values, on the CPU; rounded once, to the stored dtype.
            rows: of those that have values for some rows only, which ones.

        Raises:
            UnsupportedError: a conversion computes with values instead of moving them.
        """
        by_job: dict[int, tuple[Job, list[str]]] = {}
        for name in self._names_of(values):
            job, _ = self._loader._made_by[name]
            by_job.setdefault(id(job), (job, []))[1].append(name)
        for job, names in by_job.values():
            yield self._back(job, names, values, rows)

    def _back(
        self,
        job: Job,
        names: list[str],
        values: Mapping[str, Tensor],
        rows: Mapping[str, tuple[int, ...]],
    ) -> Stored:
        sources = [name for name, _ in job.sources]
        sizes = [self._source.tensors[n].numel for n in sources]
        starts = [0, *accumulate(sizes)]
        numbers = self._numbers(job, dict(zip(sources, starts, strict=False)))
        flat = torch.zeros(starts[-1], dtype=self.stored_dtype(names[0]))
        new = torch.zeros(starts[-1], dtype=torch.bool)
        for name in names:
            key = self._known_as(name, values)
            where = numbers[self._loader._made_by[name][1]]
            where = where if key not in rows else where[list(rows[key])]
            flat[where.flatten()] = values[key].flatten().to(flat.dtype)
            new[where.flatten()] = True
        tensors, kept = {}, {}
        for name, start, end in zip(sources, starts, starts[1:], strict=False):
            if not bool(new[start:end].any()):
                continue
            old = self._source.read(name)
            value = torch.where(new[start:end], flat[start:end], old.flatten()).view(old.shape)
            touched = new[start:end].view(old.shape[0] if old.dim() else 1, -1).any(-1)
            if bool(touched.all()):
                tensors[name] = value
            else:
                kept[name] = tuple(touched.nonzero().flatten().tolist())
                tensors[name] = value[touched]
        return Stored(tensors, kept)

    def _numbers(self, job: Job, starts: Mapping[str, int]) -> Mapping[str, Tensor]:
        """Each element in memory as the number of the element on disk that it comes from."""

        def read(name: str) -> Tensor:
            info, start = self._source.tensors[name], starts[name]
            return torch.arange(start, start + info.numel).view(info.shape)

        made = job.run(self.model, read)
        total = sum(t.numel() for t in made.values())
        together = torch.cat([t.flatten() for t in made.values()])
        moved = together.dtype == torch.int64 and bool((together.sort().values.diff() > 0).all())
        if not moved or total != sum(self._source.tensors[n].numel for n in starts):
            raise UnsupportedError(
                f"{job.target} is computed from what is on disk, and cannot be put back",
            )
        return made

    def _names_of(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        """The names of values, and of stored tensors that are tied to them."""
        seen: set[int] = set()
        for name in values:
            for twin in self._twins(name):
                made = self._loader._made_by[twin]
                if id(made[0]) not in seen or twin == name:
                    yield twin
                seen.add(id(made[0]))

    def _twins(self, name: str) -> list[str]:
        mine = self.tensors()[name]
        every = self.model.named_parameters(remove_duplicate=False)
        return [name, *(n for n, p in every if p is mine and n != name)]

    def _known_as(self, name: str, values: Mapping[str, Tensor]) -> str:
        if name in values:
            return name
        return next(twin for twin in self._twins(name) if twin in values)

    def _take(self, source: TensorSource, runner: Runner) -> None:
        self.model, self.layers = runner.model, runner.layers
        self._source, self._loader = source, runner._loader

    def _tie(self) -> None:
        """Tensors that the class ties, and that hold the same, become one parameter."""
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        for target, origin in tied.items():
            mine, theirs = (self.model.get_parameter(n) for n in (target, origin))
            if mine.shape == theirs.shape and torch.equal(mine, theirs):
                home, _, attribute = target.rpartition(".")
                module: nn.Module = self.model.get_submodule(home)
                module._parameters[attribute] = theirs
