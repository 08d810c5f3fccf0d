"""Which sequences a step sees: a function of the seed and the step's number alone, so that a run
that is resumed, and any number of processes, see the same.

Shape suffixes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_compose.calibration.tokens import TokenSet
from moe_compose.surgery.draws import Draw


class Texts(NamedTuple):
    """What is trained on, and what is held out.

    Attributes:
        tokens, fitted: text, and the sequences of it that are trained on.
        held, chosen: held-out text, and its sequences.
    """

    tokens: TokenSet
    fitted: list[int]
    held: TokenSet
    chosen: list[int]


def steps_of(
    tokens: TokenSet, fitted: Sequence[int], batch_tokens: int, seed: int
) -> Iterator[list[int]]:
    """The sequences of each step, without end: all of them in a new order in every epoch.

    Args:
        tokens: the text.
        fitted: sequences that are trained on.
        batch_tokens: a step has as many tokens, or up to one sequence more.
        seed: of the order.
    """
    lengths = {i: len(tokens.sequences[i].ids) for i in fitted}
    chosen: list[int] = []
    held = epoch = 0
    while True:
        generator = Draw(seed, f"order of epoch {epoch}").generator()
        for at in generator.permutation(len(fitted)):
            chosen.append(fitted[at])
            held += lengths[fitted[at]]
            if held >= batch_tokens:
                yield chosen
                chosen, held = [], 0
        epoch += 1


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one process runs of some sequences.

    Attributes:
        ids_BS: token ids, int64.
        mask_BS: 1 for tokens, 0 for padding; None where nothing is padded.
        real_BS: tokens that count.
        domains: of each sequence.
        tokens: how many count in all processes together.
    """

    ids_BS: Tensor  # noqa: N815
    mask_BS: Tensor | None  # noqa: N815
    real_BS: Tensor  # noqa: N815
    domains: tuple[str, ...]
    tokens: int

    def run(self, model: Any) -> Tensor:
        """A model's logits, `[B, S, V]`."""
        found = model(input_ids=self.ids_BS, attention_mask=self.mask_BS, use_cache=False)
        logits: Tensor = found.logits
        return logits


def shares_of(
    tokens: TokenSet, chosen: Sequence[int], batch: int, rank: int, size: int, device: torch.device
) -> Iterator[Share]:
    """A process's share of some sequences, `batch` of which run together over all processes.

    The longest come first, so little is padded. All processes get equally many shares; one that
    would have no sequence runs one that does not count.
    """
    order = sorted(chosen, key=lambda i: (-len(tokens.sequences[i].ids), i))
    for start in range(0, len(order), batch):
        together = order[start : start + batch]
        mine = together[rank::size]
        some = tuple(tokens.sequences[i] for i in mine or together[:1])
        (rows,) = replace(tokens, sequences=some).batches(len(some))
        mask = rows.batch.mask
        real_BS = rows.real if mine else torch.zeros_like(rows.real)
        yield Share(
            rows.batch.ids.to(device),
            None if mask is None else mask.to(device),
            real_BS.to(device),
            tuple(tokens.domains[d] for d in rows.domain_B.tolist()),
            sum(len(tokens.sequences[i].ids) for i in together),
        )
