"""How large router rows should be: a search over held-out text, all candidates in one pass.

Every candidate is a set of rows. Each batch of text goes through the model once for every
candidate, and when a batch comes to a layer, that candidate's rows are put into the layer's router.
So weights are read once, whatever the number of candidates; activations are held for candidates ×
tokens, beyond 1 GiB in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.forcing import Routers
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.rows import Rows, check_rows, stored
from moe_compose.errors import OptionError
from moe_compose.evaluation.measure import evaluate
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.evaluation.sums import Sums
from moe_compose.runtime import Layer, Runner

#: Lengths of rows that are tried.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

#: Held-out loss of a candidate by domain, in nats per token.
Losses = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Search:
    """What became of the candidates.

    Attributes:
        scales: lengths of rows that were tried.
        losses: of each, by domain, in nats per token.
        chosen: the length to take.
        why: the rule that chose it.
        expert: whose row is searched; None: all of them together.
        without: losses of the model without that expert.
        within: whether the other domains stay within the tolerance.
        tokens: held out, by domain.
        text: their digest.
    """

    scales: tuple[float, ...]
    losses: tuple[Losses, ...]
    chosen: float
    why: str
    expert: int | None = None
    without: Losses | None = None
    within: bool = True
    tokens: Mapping[str, int]
    text: str

    def to_json(self) -> dict[str, Any]:
        """The content of `routing_search.json`."""
        return asdict(self)


def search(
    source: TensorSource,
    rows: Rows,
    held_out: Mapping[str, Texts] | TokenSet,
    options: RoutingOptions | None = None,
) -> Search:
    """The length of all rows with the lowest held-out loss, domains counting alike.

    Args:
        source: an MoE.
        rows: `[E, D]` for every sparse layer, of length 1; see `rows.solve`.
        held_out: domain → text, none of which the rows follow from.
        options: how much of it, and how it is run.

    Raises:
        OptionError: rows or text that are not for this model.
        UnsupportedError: a family whose routers cannot be given rows.
    """
    options = options or RoutingOptions()
    tokens = held_tokens(source, held_out, options)
    found = losses_of(source, [_times(rows, s) for s in SCALES], tokens, options)
    means = [sum(losses.values()) / len(losses) for losses in found]
    return Search(
        scales=SCALES,
        losses=tuple(found),
        chosen=SCALES[means.index(min(means))],
        why="lowest loss, mean over the domains",
        tokens=tokens.tokens,
        text=tokens.digest(),
    )


def search_added(
    source: TensorSource,
    rows: Rows,
    expert: int,
    held_out: Mapping[str, Texts] | TokenSet,
    options: RoutingOptions | None = None,
    *,
    without: TensorSource,
    own: Sequence[str] = (),
) -> Search:
    """The largest length of one row, added later, that leaves the other domains their loss: it
    rises by `options.tolerance` at most in each of them. The other rows stay as they are.

    Args:
        source: the MoE with the expert.
        rows: `[E, D]` for every sparse layer, the expert's of length 1.
        expert: its index.
        held_out: domain → text.
        options: how much of it, and how it is run.
        without: the MoE without the expert; it is run once more.
        own: domains of the expert's own, whose loss is told and not held.

    Returns:
        What was found. Where no length is within the tolerance, the one whose worst rise is the
        smallest, and `within` is False.

    Raises:
        OptionError: rows or text that are not for this model, or no domain but the expert's own.
        UnsupportedError: a family whose routers cannot be given rows.
    """
    options = options or RoutingOptions()
    tokens = held_tokens(source, held_out, options)
    old = [d for d in tokens.domains if d not in own]
    missing = [d for d in own if d not in tokens.domains] or ([] if old else ["the other experts"])
    if missing:
        raise OptionError(
            f"there is no held-out text of {', '.join(missing)} (only of "
            f"{', '.join(tokens.domains)})"
        )
    found = losses_of(source, [_times(rows, s) for s in SCALES], tokens, options, only=[expert])
    how = EvaluateOptions(batch=options.batch, dtype=options.dtype, device=options.device, greedy=0)
    scores = evaluate(without, tokens, options=how).domains
    before = {domain: score.loss for domain, score in scores.items()}
    rises = [max(losses[d] - before[d] for d in old) for losses in found]
    fits = [i for i, rise in enumerate(rises) if rise <= options.tolerance]
    best = max(fits) if fits else rises.index(min(rises))
    rule = f"largest within {options.tolerance:g} nats of the loss without the expert"
    return Search(
        scales=SCALES,
        losses=tuple(found),
        chosen=SCALES[best],
        why=rule if fits else f"none is {rule.replace('largest ', '')}; the smallest rise",
        expert=expert,
        without=before,
        within=bool(fits),
        tokens=tokens.tokens,
        text=tokens.digest(),
    )


def held_tokens(
    source: TensorSource, held_out: Mapping[str, Texts] | TokenSet, options: RoutingOptions
) -> TokenSet:
    """Held-out text as tokens: of each domain one token in `options.held_out`.

    Raises:
        OptionError: text that cannot be run through this model, or none.
    """
    if isinstance(held_out, TokenSet):
        return tokens_of(source, held_out, options)
    amount = replace(options, tokens=max(2, options.tokens // options.held_out))
    return joined({name: tokens_of(source, texts, amount) for name, texts in held_out.items()})


def joined(parts: Mapping[str, TokenSet]) -> TokenSet:
    """One domain of each part.

    Raises:
        OptionError: there are none.
    """
    if not parts:
        raise OptionError("there is no held-out text")
    sequences = [
        replace(s, domain=i) for i, part in enumerate(parts.values()) for s in part.sequences
    ]
    return replace(
        next(iter(parts.values())),
        domains=tuple(parts),
        files=tuple(tuple(f for files in p.files for f in files) for p in parts.values()),
        sequences=tuple(sequences),
        asked=sum(p.asked for p in parts.values()),
    )


def losses_of(
    source: TensorSource,
    candidates: Sequence[Rows],
    tokens: TokenSet,
    options: RoutingOptions,
    *,
    only: Sequence[int] | None = None,
) -> list[Losses]:
    """Loss of a model under several sets of router rows, in one pass.

    Args:
        source: an MoE.
        candidates: `[E, D]` for every sparse layer.
        tokens: held-out text.
        options: how it is run.
        only: experts whose rows are taken, the others keep those that they have; None: all.

    Raises:
        OptionError: rows that are not for this model.
        UnsupportedError: a family whose routers cannot be given rows.
    """
    routers = Routers.of(source)
    chosen = list(range(routers.moe.num_experts) if only is None else only)
    for rows in candidates:
        check_rows(source, routers, rows, only)
    runner = Runner(source, dtype=options.dtype, device=options.device)
    matrices = routers.matrices(runner)
    texts = tokens.batches(options.batch)
    sums = [Sums(len(tokens.domains), 0, compared=False) for _ in candidates]

    @contextmanager
    def swapping(layer: Layer) -> Iterator[None]:
        weight = matrices[layer.index].weight
        assert isinstance(weight, torch.Tensor)
        info = source.tensors[routers.names[layer.index]]

        def swap(*_: Any) -> None:
            rows = candidates[layer.index_of_batch // len(texts)]
            weight.data[chosen] = stored(rows[layer.index], info)[chosen].to(weight)

        handle = layer.module.register_forward_pre_hook(swap)
        try:
            yield
        finally:
            handle.remove()

    def on_layer(layer: Layer) -> AbstractContextManager[None] | None:
        return swapping(layer) if layer.index in matrices else None

    def take(index: int, logits: torch.Tensor) -> None:
        which, batch = divmod(index, len(texts))
        sums[which].add_logits(texts[batch], logits, None)

    runner.run([r.batch for r in texts] * len(candidates), on_layer=on_layer, logits=take)
    return [{name: s.score([i]).loss for i, name in enumerate(tokens.domains)} for s in sums]


def _times(rows: Rows, scale: float) -> dict[int, torch.Tensor]:
    return {layer: scale * rows_ED for layer, rows_ED in rows.items()}
