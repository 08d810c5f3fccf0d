"""The text that is refitted to: which sequences are held out, and what is missing from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moe_compose.calibration.data import UNNAMED
from moe_compose.errors import OptionError
from moe_compose.surgery.plan import Plan

if TYPE_CHECKING:
    from moe_compose.calibration.tokens import TokenSet


def files_of(tokens: TokenSet) -> list[str]:
    """Where text came from, as the command line takes it."""
    named = zip(tokens.domains, tokens.files, strict=True)
    found = [(domain, f.name) for domain, files in named for f in files]
    return [name if domain == UNNAMED else f"{domain}={name}" for domain, name in found]


def held_out(tokens: TokenSet, every: int) -> set[int]:
    """Indices of the sequences that are not fitted to: of each domain every so-manieth, or the last
    where there are fewer; and all that equal one of them.

    Raises:
        OptionError: nothing would be left on either side.
    """
    held: set[int] = set()
    for domain in range(len(tokens.domains)):
        own = [i for i, s in enumerate(tokens.sequences) if s.domain == domain]
        chosen = own[every - 1 :: every] or own[-1:]
        held |= set(chosen if len(own) > 1 else ())
    texts = {tokens.sequences[i].ids for i in held}
    held = {i for i, s in enumerate(tokens.sequences) if s.ids in texts}
    if not held or len(held) == len(tokens.sequences):
        raise OptionError(
            f"{len(tokens.sequences)} sequences cannot be told into fitted and held-out ones",
            hint="Give more text, or a shorter seq_len.",
        )
    return held


def uncovered(plan: Plan, tokens: TokenSet) -> Iterator[str]:
    """A note where the experts were ranked on domains that the refit had no text of: what is not
    refitted to gets worse than it was without.
    """
    of = plan.decided.get("of")
    ranked = of.get("tokens") if isinstance(of, Mapping) else None
    if not isinstance(ranked, Mapping) or UNNAMED in (*ranked, *tokens.domains):
        return
    if missing := [d for d in ranked if d not in tokens.domains]:
        yield (
            f"refitted without text of {', '.join(missing)}, on which the experts were ranked: the "
            "result may be worse there than without a refit"
        )
