"""Tokens to compare models on: real text, tokenised by the checkpoint's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_compose.errors import OptionError

if TYPE_CHECKING:
    import torch

#: Tokens that each document gives at least: shorter contexts say little of a model.
SHORTEST = 128

#: Documents in a text file are separated so (as in TinyStories and many other sets).
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids to run, and what they are.

    Attributes:
        name: the file's name, `the bundled sample`, or `token ids spread over the vocabulary`.
        ids: int64 tensors `[1, length]`, one a sequence.
    """

    name: str
    ids: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        return sum(x.numel() for x in self.ids)


class Document(NamedTuple):
    """A text to run models on.

    Attributes:
        name: the file's name, or `the bundled sample`.
        text: its content; documents are separated by `<|endoftext|>`.
        bundled: nobody asked for it.
    """

    name: str
    text: str
    bundled: bool = False


def read_text(data: Path | None) -> Document:
    """A text file; the bundled sample of five kinds of text when `data` is None.

    Raises:
        OptionError: unreadable, not UTF-8, or empty.
    """
    if data is None:
        sample = files("moe_compose.validation").joinpath("sample.txt")
        return Document("the bundled sample", sample.read_text(encoding="utf-8"), bundled=True)
    try:
        text = data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise OptionError(f"cannot read {data} as UTF-8 text: {why}") from e
    if not text.strip():
        raise OptionError(f"{data.name} holds no text")
    return Document(data.name, text)


def sequences(
    tokenizer: Any,
    document: Document,
    tokens: int,
    longest: int,
    vocabulary: int,
    padding: int | None = None,
) -> Sequences:
    """About `tokens` token ids in sequences of at most `longest`, taken evenly from all documents.

    Args:
        tokenizer: the checkpoint's; None falls back to ids spread evenly over the vocabulary.
        document: the text.
        tokens: how many in all.
        longest: longest sequence, in tokens.
        vocabulary: size of the model's vocabulary; ids beyond it are an error of the tokenizer.
        padding: id that is left out of ids spread over the vocabulary: what a class makes of it is
            no part of the model's function.
    """
    import torch

    if tokenizer is None and not document.bundled:
        raise OptionError(
            f"{document.name} cannot be tokenised: the checkpoint has no tokenizer that loads",
            hint="Without --data, token ids spread over the vocabulary are compared.",
        )
    if tokenizer is None:
        ids = torch.arange(tokens, dtype=torch.int64) * 7919 % vocabulary
        ids = ids[ids != (-1 if padding is None else padding)]
        return Sequences("token ids spread over the vocabulary", torch.split(ids[None], longest, 1))
    documents = [d.strip() for d in document.text.split(SEPARATOR) if d.strip()]
    wanted = max(1, min(len(documents), tokens // SHORTEST))
    share = max(2, tokens // wanted)
    stride = max(1, len(documents) // wanted)
    evenly = sorted(range(len(documents)), key=lambda i: (i % stride, i))
    pieces: list[torch.Tensor] = []
    for i in evenly:
        ids = tokenizer(documents[i], truncation=True, max_length=share)["input_ids"]
        whole = torch.tensor([ids], dtype=torch.int64)
        pieces += [p for p in torch.split(whole, longest, 1) if p.numel() > 1]
        if sum(p.numel() for p in pieces) >= tokens:
            break
    if not pieces:
        raise OptionError(f"{document.name} gives no tokens to compare on")
    if (most := max(int(p.max()) for p in pieces)) >= vocabulary:
        raise OptionError(
            f"the tokenizer gives id {most}, beyond the vocabulary of the model ({vocabulary})"
        )
    return Sequences(document.name, tuple(pieces))
