"""Text, in whatever form it is given, as tokens of a checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from moe_compose.calibration.data import Domain, domains_of
from moe_compose.calibration.tokenizer import context_of, tokenizer_of, vocabulary_of
from moe_compose.calibration.tokens import TokenSet, tokenise
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError

#: Texts; texts by domain; what `read_domains` made of files; or what `tokenise` made of that.
Texts = Sequence[str] | Mapping[str, Sequence[str]] | Sequence[Domain] | TokenSet


class Amount(Protocol):
    """Options that say how much text."""

    @property
    def tokens(self) -> int:
        """In all."""

    @property
    def seq_len(self) -> int:
        """Longest sequence, in tokens."""

    @property
    def seed(self) -> int:
        """Of the draw."""


def tokens_of(
    source: TensorSource, texts: Texts, amount: Amount, *beside: TensorSource | None
) -> TokenSet:
    """Texts as the checkpoint's tokenizer cuts them; a `TokenSet` as it is.

    Args:
        source: whose tokenizer it is.
        texts: in any of the forms.
        amount: how much of them; of a `TokenSet`, all.
        beside: other models that run them: sequences fit into their contexts too.

    Raises:
        OptionError: text that cannot be run through this model.
        UnsupportedError: the source has no tokenizer.
    """
    vocabulary = vocabulary_of(source.config)
    if isinstance(texts, TokenSet):
        most = max(max(s.ids) for s in texts.sequences)
        if vocabulary is not None and most >= vocabulary:
            raise OptionError(f"token id {most} is beyond the model's vocabulary ({vocabulary})")
        return texts
    ready = [] if isinstance(texts, Mapping) else [d for d in texts if isinstance(d, Domain)]
    models = [source, *(s for s in beside if s is not None)]
    return tokenise(
        ready if ready and len(ready) == len(texts) else domains_of(texts),  # type: ignore[arg-type]
        tokenizer_of(source),
        tokens=amount.tokens,
        seq_len=min(amount.seq_len, *(context_of(s.config) or amount.seq_len for s in models)),
        seed=amount.seed,
        vocabulary=vocabulary,
    )
