"""From a tensor source to the tensors of a model in memory, a few names at a time.

Everything that can be wrong about names and shapes is found before a weight is read: all jobs are
run once on the meta device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource, torch_dtype
from moe_compose.errors import CheckpointError
from moe_compose.runtime import compat
from moe_compose.runtime.compat import Job
from moe_compose.runtime.memory import own_pages, trim
from moe_compose.runtime.skeleton import Skeleton

_SHOWN = 20


class Loader:
    """Reads tensors of a model, by their names in memory.

    Args:
        source: the checkpoint or plan; not quantised.
        skeleton: the model.
        dtype: compute dtype.

    Attributes:
        unused: names on disk that the class has no use for.
        sizes: bytes of each tensor in memory, by name in memory.

    Raises:
        CheckpointError: a tensor that the class needs is not in the source, or has another shape;
            all of them at once.
    """

    def __init__(self, source: TensorSource, skeleton: Skeleton, dtype: torch.dtype) -> None:
        self._source, self._model = source, skeleton.model
        self._dtypes = compat.dtypes_of(self._model, dtype)
        jobs, self.unused = compat.jobs_of(self._model, source.tensors)
        self._targets = {name: job.target for job in jobs for name, _ in job.sources}
        self._made_by: dict[str, tuple[Job, str]] = {}
        self.sizes: dict[str, int] = {}
        problems: list[str] = []
        for job in jobs:
            problems += self._dry_run(job, skeleton)
        problems += self._tie_or_miss(skeleton)
        if problems:
            more = len(problems) - _SHOWN
            raise CheckpointError(
                f"{source.label} is not what {type(self._model).__name__} needs",
                problems=[*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])],
            )

    def target_of(self, name: str) -> str | None:
        """The name in memory of what a tensor on disk goes into; of several, the first."""
        return self._targets.get(name)

    def load(self, names: Iterable[str], stop: threading.Event | None = None) -> dict[str, Tensor]:
        """Read tensors, on the CPU, in their dtypes.

        Args:
            names: in memory.
            stop: when set, reading ends at the next tensor.

        Raises:
            InterruptedError: `stop` was set.
        """
        found: dict[str, Tensor] = {}
        made: dict[str, Tensor] = {}
        last: Job | None = None
        for name in names:
            job, made_as = self._made_by[name]
            if job is not last:
                made = job.run(self._model, partial(self._read, self._dtypes[job.target], stop))
                last = job
                if len(job.sources) > 1:
                    trim()
            found[name] = made[made_as]
        return found

    def _read(self, dtype: torch.dtype, stop: threading.Event | None, name: str) -> Tensor:
        if stop is not None and stop.is_set():
            raise InterruptedError
        return own_pages(self._source.read(name), dtype)

    def _shape_only(self, dtype: torch.dtype, name: str) -> Tensor:
        info = self._source.tensors[name]
        torch_dtype(info.dtype)
        return torch.empty(info.shape, dtype=dtype, device="meta")

    def _codes(self, job: Job) -> list[str]:
        """What a job reads that holds no floating-point numbers."""
        infos = [self._source.tensors[name] for name, _ in job.sources]
        return [
            f"{i.name} is {i.dtype}, not of floating point"
            for i in infos
            if i.dtype not in FLOAT_DTYPES
        ]

    def _dry_run(self, job: Job, skeleton: Skeleton) -> list[str]:
        """Note what a job makes; returns what is wrong with it."""
        dtype = self._dtypes[job.target]
        if dtype.is_floating_point and (codes := self._codes(job)):
            return codes
        try:
            made = job.run(self._model, partial(self._shape_only, dtype))
        except Exception as e:
            # Conversions are transformers' own and raise what they like on shapes that do not fit.
            return [f"{job.sources[0][0]} and its like do not make {job.target}: {e}"]
        wrong = []
        for name, tensor in made.items():
            if name not in skeleton.shapes:
                continue
            if tensor.shape != skeleton.shapes[name]:
                shapes = f"{list(tensor.shape)}, not {list(skeleton.shapes[name])}"
                wrong.append(f"{name} (from {job.sources[0][0]}) has shape {shapes}")
            self._made_by[name] = job, name
            self.sizes[name] = tensor.nbytes
        return wrong

    def _tie_or_miss(self, skeleton: Skeleton) -> list[str]:
        """Let tied tensors share what makes them; returns what is missing."""
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        groups: dict[str, set[str]] = {}
        for target, origin in tied.items():
            groups.setdefault(origin, {origin}).add(target)
        for group in groups.values():
            known = sorted(group & self._made_by.keys())
            for name in group - self._made_by.keys() if known else ():
                self._made_by[name] = self._made_by[known[0]]
                self.sizes[name] = self.sizes[known[0]]
        return [f"{name} is missing" for name in skeleton.shapes if name not in self._made_by]


class Prefetch:
    """Reads one set of tensors ahead, in a thread of its own; a context.

    Args:
        loader: what reads.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._pool = ThreadPoolExecutor(1, "moe-compose prefetch")
        self._stop = threading.Event()
        self._key: object = None
        self._future: Future[dict[str, Tensor]] | None = None

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._future = None

    def start(self, key: object, names: Iterable[str]) -> None:
        """Begin to read; what was read before and not taken is forgotten."""
        self._key = key
        self._future = self._pool.submit(self._loader.load, tuple(names), self._stop)

    def take(self, key: object, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of `key`: those being read ahead, or read now."""
        future, self._future = self._future, None
        if future is not None and self._key == key:
            return future.result()
        if future is not None:
            future.cancel()
        return self._loader.load(names, self._stop)
