"""What statistics are of: the checkpoint, the data, and how they were measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moe_compose.architectures import find
from moe_compose.architectures.parts import layout_of
from moe_compose.calibration.reading import DataFile
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, OptionError
from moe_compose.version import versions

#: Of the data, kept apart.
HALVES = 2

#: Packages that numbers may depend on.
PACKAGES = ("moe-compose", "torch", "transformers", "tokenizers")

#: Of the folder's content; raised when it comes to mean something else.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything about statistics but the sums.

    Attributes:
        source: the checkpoint's label.
        digest: of its config, names, dtypes and shapes.
        routers: SHA-256 of all router tensors (see `fingerprint`); empty for a family without a
            form.
        top_k: experts per token.
        domains: their names.
        files: where each domain's text came from.
        tokens: of each half, by domain; padding not counted.
        text: digest of the token ids.
        seq_len: longest sequence, in tokens.
        seed: of the draw.
        dtype: what was computed in.
        device: kind of device.
        sample: tokens that similarities were gathered on; 0 if they were not.
        sample_bytes: their files' size.
        loo_tokens: tokens that experts were masked on; 0 if they were not.
        notes: what could not be measured, and why.
        versions: of packages.
    """

    source: str
    digest: str
    routers: str
    top_k: int
    domains: tuple[str, ...]
    files: tuple[tuple[DataFile, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    text: str
    seq_len: int
    seed: int
    dtype: str
    device: str
    sample: int = 0
    sample_bytes: int = 0
    loo_tokens: int = 0
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str]

    def __add__(self, other: Record) -> Record:
        """Of both texts together.

        Raises:
            OptionError: the two are not of the same checkpoint, domains and arithmetic; all
                differences at once.
        """
        same = ("digest", "routers", "domains", "top_k", "dtype")
        problems = [
            f"{name}: {getattr(self, name)} and {getattr(other, name)}"
            for name in same
            if getattr(self, name) != getattr(other, name)
        ]
        if self.sample or other.sample:
            problems.append("similarities are of one sample of tokens; gather them in one run")
        if self.loo_tokens or other.loo_tokens:
            problems.append("experts are masked on one sample of tokens; mask them in one run")
        if problems:
            raise OptionError("these statistics cannot be added", problems=problems)
        tokens = zip(self.tokens, other.tokens, strict=True)
        return replace(
            self,
            files=tuple(
                tuple(dict.fromkeys((*a, *b))) for a, b in zip(self.files, other.files, strict=True)
            ),
            tokens=tuple(tuple(x + y for x, y in zip(a, b, strict=True)) for a, b in tokens),
            text=hashlib.sha256(f"{self.text}\0{other.text}".encode()).hexdigest(),
            seq_len=max(self.seq_len, other.seq_len),
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, found: Any) -> Record:
        """The record that `to_json` made.

        Raises:
            CheckpointError: of another format, or damaged.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            have = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise CheckpointError(
                f"these statistics have format {have}; this version reads {FORMAT}",
                hint="Measure them again with moe-compose calibrate.",
            )
        given = {name: value for name, value in found.items() if name in names}
        try:
            for name in ("domains", "notes"):
                given[name] = tuple(map(str, given[name]))
            given["tokens"] = tuple(tuple(map(int, row)) for row in given["tokens"])
            given["files"] = tuple(tuple(DataFile(**f) for f in row) for row in given["files"])
            return cls(**given)
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"stats.json is damaged: {e}") from e


def record_of(
    source: TensorSource, tokens: TokenSet, *, top_k: int, dtype: str, device: str, **more: Any
) -> Record:
    """The record of a run over `tokens`; `more` is what only some runs have."""
    table = [[0] * len(tokens.domains) for _ in range(HALVES)]
    for s in tokens.sequences:
        table[s.half][s.domain] += len(s.ids)
    return Record(
        source=source.label,
        digest=source.digest(),
        routers=fingerprint(source),
        top_k=top_k,
        domains=tokens.domains,
        files=tokens.files,
        tokens=tuple(map(tuple, table)),
        text=tokens.digest(),
        seq_len=tokens.seq_len,
        seed=tokens.seed,
        dtype=dtype,
        device=device,
        versions=versions(*PACKAGES),
        **more,
    )


def fingerprint(source: TensorSource) -> str:
    """Hex SHA-256 of all router tensors, as they are on disk: tells two fine-tunes apart whose
    names and shapes are the same. Empty for a family without a form.

    Reads some megabytes: `layers · experts · hidden` elements.
    """
    import torch

    form = find(source.config)
    if form is None or not form.is_moe:
        return ""
    form = layout_of(form, source.tensors)
    h = hashlib.sha256()
    for layer in form.moe(source.config).sparse_layers:
        for tensor in form.router:
            name = tensor.name.format(i=layer)
            if name in source.tensors:
                h.update(name.encode())
                for piece in source.stream(name):
                    h.update(piece.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
