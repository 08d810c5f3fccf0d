"""Replacing tensors: a small checkpoint of changed ones over a large one.

What is trained, or solved for, is not a plan: it leaves the tensors that changed in a folder, and
putting them in their places is a plan again. So all that reaches the disk goes through one writer,
and what did not change keeps its bytes.

    changed.json               which rows a tensor stands for, and the SHA-256 of all values
    config.json                of the model that the tensors are for
    model-00003.safetensors    a layer's tensors, or whatever was kept together
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.copying import os_errors, write_file
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import Extent, TensorInfo, TensorSource
from moe_compose.errors import CheckpointError, PlanError
from moe_compose.surgery.history import read_json
from moe_compose.surgery.indices import Rows
from moe_compose.surgery.plan import UNTRAINED, UNTRAINED_ROUTER, OutputTensor, Plan, Preservation
from moe_compose.surgery.transforms import Concat, Read, Take, Transform

if TYPE_CHECKING:
    import torch

RECORD_NAME = "changed.json"

#: Operations that finish what a plan under them has made: they are flags of others, and what that
#: plan says of its source is said of the source of both.
FINISHING = ("refit", "route")


@dataclass(frozen=True, eq=False)
class Changed:
    """Tensors that take the place of others: a `TensorSource` whose digest covers their values,
    since two trainings of one model differ in nothing else.

    Attributes:
        checkpoint: the folder.
        rows: tensor → the rows, ascending, along the first dimension that it stands for; those
            that are not named stand for the whole.
        content: hex SHA-256 of names, rows and values.
        label: what it is called.
    """

    checkpoint: Checkpoint
    rows: Mapping[str, tuple[int, ...]]
    content: str
    label: str = "changed tensors"
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.checkpoint.tensors

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self.checkpoint.weight_files

    def digest(self) -> str:
        return self.content

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return self.checkpoint.extents(name)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        return self.checkpoint.stream(name)

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name)

    @classmethod
    def open(cls, folder: str | Path) -> Changed:
        """What `ChangedWriter` left in a folder; reads no values.

        Raises:
            CheckpointError: no such folder, or a damaged one.
        """
        path = Path(folder)
        found = read_json(path / RECORD_NAME, path.name)
        try:
            rows = {str(n): tuple(int(r) for r in ids) for n, ids in found["rows"].items()}
            content = str(found["sha256"])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(f"{path.name}/{RECORD_NAME} is damaged: {e}") from e
        return cls(Checkpoint.open(path), rows, content)


class ChangedWriter:
    """Writes changed tensors, some at a time.

    Args:
        config: of the model that they are for.
        folder: a new or empty one; None: a temporary one, gone with the `Changed` that is made.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self._config, self._temporary = config, folder is None
        self._folder = Path(tempfile.mkdtemp(prefix="moe-compose-")) if folder is None else folder
        self._rows: dict[str, tuple[int, ...]] = {}
        self._hash = hashlib.sha256()
        self._files: dict[str, list[str]] = {}

    def add(self, tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Sequence[int]]) -> None:
        """Write one more file.

        Args:
            tensors: by the names of what they replace, in their dtypes.
            rows: of tensors that stand for some rows only, which ones, ascending.
        """
        from safetensors.torch import save

        if not tensors:
            return
        self._rows |= {name: tuple(ids) for name, ids in rows.items()}
        data = save({name: t.contiguous() for name, t in sorted(tensors.items())})
        self._hash.update(repr(sorted((n, tuple(ids)) for n, ids in rows.items())).encode())
        self._hash.update(data)
        name = f"model-{len(self._files):05d}.safetensors"
        with os_errors(f"write {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / name, data)
        self._files[name] = list(tensors)

    def finish(self) -> Changed | None:
        """Write what belongs beside them; None where nothing changed."""
        if not self._files:
            self.discard()
            return None
        record = {"rows": self._rows, "sha256": self._hash.hexdigest()}
        where = {n: file for file, names in self._files.items() for n in names}
        index = {"metadata": {}, "weight_map": where}
        documents = {"config.json": dict(self._config), "model.safetensors.index.json": index}
        for name, document in (documents | {RECORD_NAME: record}).items():
            write_file(self._folder / name, json.dumps(document, indent=2).encode())
        changed = Changed.open(self._folder)
        if self._temporary:
            weakref.finalize(changed, shutil.rmtree, self._folder, ignore_errors=True)
        return changed

    def discard(self) -> None:
        """Remove a temporary folder that nobody will ask for."""
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)


def replace_tensors(
    source: TensorSource,
    changed: Changed,
    *,
    operation: str,
    preservation: Preservation,
    options: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    decided: Mapping[str, Any] | None = None,
    reports: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a model with some tensors, or rows of them, in place of its own. Reads no weights.

    Args:
        source: a checkpoint or a plan.
        changed: the tensors, in the dtypes of those that they replace.
        operation: what made them (`refit`).
        preservation: how far the function is kept; of what finishes a plan, how far beyond that.
        options: of what made them.
        notes: what a user should know.
        decided: for the record.
        reports: documents beside the result; those of a plan that is the source stay.

    Returns:
        A checked plan.

    Raises:
        PlanError: tensors that the source does not have, or of another shape or dtype; all of them.
    """
    if problems := list(_misfits(source, changed)):
        raise PlanError("these tensors cannot take the place of others", problems=problems)
    outputs, dropped = [], {}
    for name, info in source.tensors.items():
        value: Transform = Read("source", info)
        if name in changed.tensors:
            new = Read("changed", changed.tensors[name])
            value = _spliced(Read("source", info), new, changed.rows.get(name))
        if all(leaf.source == "changed" for leaf in value.leaves()):
            dropped[f"source:{name}"] = "replaced"
        outputs.append(OutputTensor(name, value))
    before = source if isinstance(source, Plan) else None
    finishes = operation in FINISHING
    return Plan(
        operation=operation,
        options=dict(options or {}),
        config=dict(source.config),
        outputs=tuple(outputs),
        sources={"source": source, "changed": changed},
        preservation=_finished(before, preservation) if finishes else preservation,
        files=source.files,
        dropped=dropped,
        notes=notes + tuple(_still_true(before, operation)),
        card=None if before else source.files.get("README.md"),
        decided={"content": changed.content, **(decided or {})},
        reports={**(before.reports if before else {}), **(reports or {})},
    ).check()


def _finished(before: Plan | None, own: Preservation) -> Preservation:
    """What two operations together keep, of the source of the first."""
    if before is None:
        return own
    stated = before.preservation
    reference = f"source/{stated.reference or next(iter(before.sources))}"
    if own.kind == "exact":
        return replace(stated, reference=reference)
    why = own.why if stated.kind == "exact" else f"{stated.why}; {own.why}"
    return replace(own, why=why, reference=reference)


def _still_true(before: Plan | None, operation: str) -> Iterator[str]:
    """Notes of the plan before that hold on."""
    for note in before.notes if before else ():
        if operation != "train-router" or not note.startswith((UNTRAINED, UNTRAINED_ROUTER)):
            yield note


def _misfits(source: TensorSource, changed: Changed) -> Iterator[str]:
    for name, new in changed.tensors.items():
        old, rows = source.tensors.get(name), changed.rows.get(name)
        if old is None:
            yield f"{source.label} has no {name}"
            continue
        shape = old.shape if rows is None else (len(rows), *old.shape[1:])
        if (new.dtype, new.shape) != (old.dtype, shape):
            yield (
                f"{name} is {new.dtype} {list(new.shape)}, and would replace {old.dtype} "
                f"{list(shape)}"
            )
        elif rows is not None and (list(rows) != sorted({*rows}) or rows[-1] >= old.shape[0]):
            yield f"{name}: rows must ascend, below {old.shape[0]} ({list(rows)})"


def _spliced(old: Read, new: Read, rows: Sequence[int] | None) -> Transform:
    """The old tensor with rows of the new one in their places: runs of bytes, one after another."""
    if rows is None or len(rows) == old.spec.shape[0]:
        size = new.spec.shape[0] if new.spec.shape else 0
        return Take(new, Rows(0, size)) if size else new  # no plain copy: `Plan.copied` tells
    runs = [[r for _, r in run] for _, run in groupby(enumerate(rows), lambda p: p[1] - p[0])]
    parts: list[Transform] = []
    at = taken = 0
    for run in runs:
        if at < run[0]:
            parts.append(Take(old, Rows(at, run[0])))
        parts.append(Take(new, Rows(taken, taken + len(run))))
        at, taken = run[-1] + 1, taken + len(run)
    if at < old.spec.shape[0]:
        parts.append(Take(old, Rows(at, old.spec.shape[0])))
    return Concat(tuple(parts))
