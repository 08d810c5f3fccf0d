"""Which parts of which documents become sequences of token ids."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from moe_compose.calibration.data import Domain
from moe_compose.calibration.reading import Document
from moe_compose.errors import OptionError

#: Shorter sequences say nothing: there is nothing to predict.
SHORTEST = 2

#: Sequences are drawn from so many times the tokens wanted: one long document is not all of it.
POOL = 8


def drawn_from(
    domain: Domain, tokenizer: Any, wanted: int, seq_len: int, seed: int
) -> Iterator[tuple[int, ...]]:
    """Sequences of a domain, `wanted` tokens in all, the last one cut to fit.

    Args:
        domain: its documents.
        tokenizer: the checkpoint's own.
        wanted: tokens; fewer where there are no more.
        seq_len: longest sequence.
        seed: of the draw.

    Raises:
        OptionError: no document has two tokens, or a chat that cannot be made text.
    """
    generator = random.Random(f"{seed} {domain.name}")
    documents = list(domain.documents)
    generator.shuffle(documents)
    pool: list[array[int]] = []  # of 4 bytes a token
    held = 0
    for document in documents:
        pieces = list(_pieces(_ids(document, tokenizer, domain.name), tokenizer, seq_len))
        pool += (array("i", piece) for piece in pieces)
        held += sum(map(len, pieces))
        if held >= POOL * wanted:
            break
    if not pool:
        raise OptionError(f"{domain.name} is too short: no document has {SHORTEST} tokens or more")
    generator.shuffle(pool)
    left = wanted
    for piece in pool:
        if left < SHORTEST:
            return
        yield tuple(piece[:left])
        left -= len(piece[:left])


def _ids(document: Document, tokenizer: Any, name: str) -> list[int]:
    """A document's token ids, with what the tokenizer puts around a text."""
    if isinstance(document, str):
        found: list[int] = tokenizer(document, verbose=False)["input_ids"]
        return found
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            f"{name} holds chats, and the checkpoint's tokenizer has no chat template"
        )
    try:
        text = tokenizer.apply_chat_template(list(document), tokenize=False)
    except Exception as e:  # templates raise whatever they like
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise OptionError(f"{name}: the chat template refuses a chat: {first}") from e
    whole: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return whole


def _pieces(ids: Sequence[int], tokenizer: Any, seq_len: int) -> Iterator[tuple[int, ...]]:
    """A document in sequences, each beginning as the tokenizer begins a text."""
    first = getattr(tokenizer, "bos_token_id", None)
    begin = (first,) if first is not None and list(ids[:1]) == [first] else ()
    body = ids[len(begin) :]
    step = seq_len - len(begin)
    for start in range(0, len(body), step):
        piece = (*begin, *body[start : start + step])
        if len(piece) >= SHORTEST:
            yield piece


def check_ids(name: str, sequences: Sequence[tuple[int, ...]], vocabulary: int | None) -> None:
    """Raises `OptionError` for an id that the model has no row for."""
    most = max(max(ids) for ids in sequences)
    if vocabulary is not None and most >= vocabulary:
        raise OptionError(
            f"{name}: the tokenizer gives id {most}, beyond the model's vocabulary ({vocabulary})"
        )
