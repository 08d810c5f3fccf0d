"""Documents → sequences of token ids → batches.

Every sequence is part of one document: no token sees another document. A document longer than
`seq_len` is cut, a short one kept as it is; in a batch it is padded on the right, and padded
positions never count. Where the tokenizer begins every text with a token of its own, so does every
piece.

The same data, tokenizer, options and seed give the same sequences on every machine.

Shape suffixes: B sequences of a batch, S positions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import Domain
from moe_compose.calibration.drawing import SHORTEST, check_ids, drawn_from
from moe_compose.calibration.reading import DataFile
from moe_compose.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_compose.runtime import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A part of one document.

    Attributes:
        ids: token ids.
        domain: index into `TokenSet.domains`.
        half: 0 or 1, in turn within its domain: the two halves of the data that are compared.
    """

    ids: tuple[int, ...]
    domain: int
    half: int


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch, and what its rows are.

    Attributes:
        batch: token ids and mask, as `Runner.run` takes it.
        domain_B: index into `TokenSet.domains`, int64.
        half_B: 0 or 1, int64.
        sequence_B: index into `TokenSet.sequences`, int64.
    """

    batch: Batch
    domain_B: Tensor  # noqa: N815
    half_B: Tensor  # noqa: N815
    sequence_B: Tensor  # noqa: N815

    @property
    def real(self) -> Tensor:
        """True for tokens, False for padding, `[B, S]`."""
        import torch

        mask = self.batch.mask
        return torch.ones_like(self.batch.ids, dtype=torch.bool) if mask is None else mask.bool()


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Token ids by domain, ready to run.

    Attributes:
        domains: their names.
        files: where each domain's text came from.
        sequences: all of them, domain after domain.
        seq_len: longest sequence allowed, in tokens.
        seed: of the draw.
        asked: tokens that were asked for.
        padding: id that padded positions hold.
    """

    domains: tuple[str, ...]
    files: tuple[tuple[DataFile, ...], ...]
    sequences: tuple[TokenSequence, ...]
    seq_len: int
    seed: int
    asked: int
    padding: int = 0

    @classmethod
    def of_ids(
        cls, by_domain: Mapping[str, Sequence[Sequence[int]]], *, padding: int = 0, seed: int = 0
    ) -> TokenSet:
        """Token ids that are there already, by domain, in their order.

        Raises:
            OptionError: a domain without sequences, or an empty sequence.
        """
        empty = [name for name, rows in by_domain.items() if not rows or not all(map(len, rows))]
        if empty or not by_domain:
            raise OptionError(f"domains without tokens: {', '.join(empty) or 'none are given'}")
        sequences = tuple(
            TokenSequence(tuple(ids), domain, i % 2)
            for domain, rows in enumerate(by_domain.values())
            for i, ids in enumerate(rows)
        )
        lengths = [len(s.ids) for s in sequences]
        return cls(
            domains=tuple(by_domain),
            files=((),) * len(by_domain),
            sequences=sequences,
            seq_len=max(lengths),
            seed=seed,
            asked=sum(lengths),
            padding=padding,
        )

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Domain → tokens, padding not counted."""
        found = dict.fromkeys(self.domains, 0)
        for s in self.sequences:
            found[self.domains[s.domain]] += len(s.ids)
        return found

    def part(self, index: int, parts: int) -> TokenSet:
        """Every `parts`-th sequence of each half, for one of several processes: the statistics of
        all parts sum to those of the whole (`stats.add_all`).

        Raises:
            OptionError: no such part, or one without sequences.
        """
        if not 0 <= index < parts:
            raise OptionError(f"part ({index}) must lie in 0..{parts - 1}")
        by_half = ([s for s in self.sequences if s.half == h] for h in (0, 1))
        chosen = tuple(s for half in by_half for s in half[index::parts])
        if not chosen:
            raise OptionError(f"{len(self.sequences)} sequences do not make {parts} parts")
        return replace(self, sequences=chosen)

    def digest(self) -> str:
        """Hex SHA-256 of the domains' names and of all sequences."""
        h = hashlib.sha256("\0".join(self.domains).encode())
        for s in self.sequences:
            h.update(f"\0{s.domain} {s.half}\0".encode())
            h.update(" ".join(map(str, s.ids)).encode())
        return h.hexdigest()

    def batches(self, size: int) -> list[Rows]:
        """The sequences, `size` at a time, the longest first: so little as possible is padded.

        Raises:
            OptionError: `size` is below 1.
        """
        if size < 1:
            raise OptionError(f"a batch must hold at least 1 sequence ({size})")
        order = sorted(range(len(self.sequences)), key=lambda i: (-len(self.sequences[i].ids), i))
        return [self._rows(order[i : i + size]) for i in range(0, len(order), size)]

    def _rows(self, chosen: Sequence[int]) -> Rows:
        import torch

        from moe_compose.runtime import Batch

        rows = [self.sequences[i] for i in chosen]
        longest = max(len(r.ids) for r in rows)
        ids_BS = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for b, row in enumerate(rows):
            ids_BS[b, : len(row.ids)] = torch.tensor(row.ids)
            mask_BS[b, : len(row.ids)] = 1
        return Rows(
            batch=Batch(ids_BS, None if bool(mask_BS.all()) else mask_BS),
            domain_B=torch.tensor([r.domain for r in rows]),
            half_B=torch.tensor([r.half for r in rows]),
            sequence_B=torch.tensor(list(chosen)),
        )


def tokenise(
    domains: Sequence[Domain],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    vocabulary: int | None = None,
) -> TokenSet:
    """Tokenise documents and draw sequences from them.

    Args:
        domains: the text.
        tokenizer: the checkpoint's own (`tokenizer_of(source)`).
        tokens: how many in all; each domain gives the same share, or all it has if that is less,
            which is said.
        seq_len: longest sequence, in tokens.
        seed: of the draw of documents and of sequences.
        vocabulary: rows of the model's embedding; ids beyond it are refused.

    Raises:
        OptionError: text too short, ids beyond the vocabulary, a chat without a chat template;
            all domains at once.
    """
    _check_sizes(len(domains), tokens, seq_len)
    share, rest = divmod(tokens, len(domains))
    sequences: list[TokenSequence] = []
    problems: list[str] = []
    for index, domain in enumerate(domains):
        wanted = share + (index < rest)
        try:
            drawn = list(drawn_from(domain, tokenizer, wanted, seq_len, seed))
            check_ids(domain.name, drawn, vocabulary)
        except OptionError as e:
            problems.append(e.message)
            continue
        if (found := sum(map(len, drawn))) < wanted:
            log.warning(
                "%s gives %s of the %s tokens wanted", domain.name, f"{found:,}", f"{wanted:,}"
            )
        sequences += [TokenSequence(ids, index, i % 2) for i, ids in enumerate(drawn)]
    if problems:
        raise OptionError("this text cannot be run through this model", problems=problems)
    padding = getattr(tokenizer, "pad_token_id", None)
    fits = isinstance(padding, int) and 0 <= padding < (vocabulary or padding + 1)
    return TokenSet(
        domains=tuple(d.name for d in domains),
        files=tuple(d.files for d in domains),
        sequences=tuple(sequences),
        seq_len=seq_len,
        seed=seed,
        asked=tokens,
        padding=padding if isinstance(padding, int) and fits else 0,
    )


def _check_sizes(domains: int, tokens: int, seq_len: int) -> None:
    problems = []
    if not domains:
        problems.append("there are no domains: give some text")
    if seq_len < SHORTEST:
        problems.append(f"seq_len ({seq_len}) must be at least {SHORTEST}")
    if tokens < SHORTEST * max(domains, 1):
        problems.append(f"tokens ({tokens}) must be at least {SHORTEST} for each domain")
    if problems:
        raise OptionError("these sizes cannot be meant", problems=problems)
