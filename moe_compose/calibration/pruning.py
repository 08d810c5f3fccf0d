"""From statistics to what `prune` keeps.

Surgery takes a ranking and knows of no statistics (`surgery.prune`); here are the rankings: by what
was measured on text, or by the weights alone (`aimer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.prune import prune_ranked, sized
from moe_compose.surgery.prune_options import (
    OF_MASKED,
    WITHOUT_STATS,
    PruneOptions,
    kept_count,
    option_problems,
)
from moe_compose.surgery.ranking import Ranking
from moe_compose.surgery.selection import moe_form

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats

#: A super expert's largest output exceeds this quantile over all experts, and this share of the
#: largest of all; and it lies in this share of the layers, from the first (2507.23279).
_QUANTILE, _OF_LARGEST, _FIRST_LAYERS = 0.995, 0.1, 0.75

#: Agreement of two halves of the text on what is kept, below which there was too little of it.
_ENOUGH = 0.8


def prune(
    source: TensorSource,
    stats: ExpertStats | Ranking | Mapping[int, Sequence[int]] | None,
    options: PruneOptions,
) -> Plan:
    """Plan an MoE with fewer experts. Reads no weights.

    Args:
        source: an MoE: a checkpoint, or a plan.
        stats: what calibration measured on it; or a ranking (`rank_by_weights(source)` for
            criterion aimer), or layer → experts, best first, for criterion given; None where the
            criterion needs nothing.
        options: how many experts stay, and which.

    Returns:
        A checked plan, of the class "none": exactly the source with those experts masked.

    Raises:
        OptionError: options that cannot be meant, all faults at once; or the criterion's evidence
            is missing.
        CheckpointError: the statistics are of another checkpoint.
        UnsupportedError: experts of this family, or these tensors, cannot be selected.

    Example:
        >>> small = prune(moe, stats, PruneOptions(keep=4))            # doctest: +SKIP
        >>> small.decided["kept"]["0"]                                 # doctest: +SKIP
        [0, 2, 5, 7]
    """
    form, moe = moe_form(source)
    problems = [*option_problems(options, moe), *evidence_problems(stats, options)]
    if problems:
        raise OptionError(f"cannot prune {source.label} like this", problems=problems)
    options = sized(source, options)
    if isinstance(stats, Ranking):
        ranking = stats
    elif isinstance(stats, Mapping):
        ranking = Ranking.given(stats)
    elif options.criterion == "random":
        ranking = Ranking.random(moe.num_experts, moe.sparse_layers, options.seed)
    elif stats is None:
        assert options.ranking is not None
        ranking = Ranking.load(options.ranking)
    else:
        from moe_compose.calibration.losses import with_losses

        ranking = rank(stats.check(source), options, form.layers.integer(source.config), moe)
        return with_losses(prune_ranked(source, ranking, options), stats, options.criterion)
    return prune_ranked(source, ranking, options)


def evidence_problems(
    stats: ExpertStats | Ranking | Mapping[int, Sequence[int]] | None, options: PruneOptions
) -> Iterator[str]:
    """What the criterion needs and does not have, or has and does not need."""
    criterion, domains = options.criterion, getattr(stats, "domains", None)
    record = getattr(stats, "record", None)
    if criterion in ("random", "given") and domains is not None:
        yield f"statistics have no meaning for criterion {criterion}: leave them out"
    if criterion == "given" and stats is not None and options.ranking is not None:
        yield "criterion given takes one ranking: the file, or the argument"
    elif criterion == "given" and options.ranking is None:
        if stats is None:
            yield 'criterion given needs a ranking (--ranking FILE: {"layer": [experts, ...]})'
    elif criterion == "aimer" and not isinstance(stats, Ranking):
        yield "criterion aimer needs rank_by_weights(source): a plan reads no weights itself"
    elif criterion not in WITHOUT_STATS and domains is None and not isinstance(stats, Ranking):
        yield f"criterion {criterion} needs statistics: moe-compose calibrate makes them (--stats)"
    if criterion in OF_MASKED and record is not None and not record.loo_tokens:
        yield (
            f"criterion {criterion} needs statistics of masked experts, which these are not: "
            "measure them with moe-compose calibrate --loo-tokens 2048"
        )
    if isinstance(stats, Ranking) and criterion not in ("given", stats.criterion):
        yield f"the ranking is by {stats.criterion}, not by {criterion}"
    if domains is not None:
        for name in options.weights:
            if name not in domains:
                yield f"domain_weight: no domain {name!r}; there are {', '.join(domains)}"
        if options.weights and not any(options.weights.get(d, 1.0) for d in domains):
            yield "domain_weight leaves every domain at 0"


def rank(stats: ExpertStats, options: PruneOptions, layers: int, moe: MoE) -> Ranking:
    """What statistics say of every expert.

    Args:
        stats: the statistics.
        options: of the pruning: criterion, weights of domains, super experts.
        layers: decoder layers of the model.
        moe: what its config says of experts.
    """
    from moe_compose.calibration.criteria import worth

    weights = options.weights or None
    worths = {
        layer: tuple(worth(stats, layer, options.criterion, weights=weights).tolist())
        for layer in stats.layers
    }
    record = stats.record
    of: dict[str, Any] = {
        "stats_of": record.source,
        "text": record.text,
        "tokens": {d: stats.tokens(d) for d in stats.domains},
    }
    ranking = Ranking(criterion=options.criterion, worths=worths, of=of)
    if options.super_experts == "keep":
        ranking = replace(ranking, guarded=super_experts(stats, layers))
    agreement = _agreement(stats, options, kept_count(options, moe) / moe.num_experts)
    return replace(ranking, notes=(agreement,) if agreement else ())


def super_experts(stats: ExpertStats, layers: int) -> dict[int, tuple[int, ...]]:
    """Layer → experts whose outputs are enormous, without which a model breaks (2507.23279).

    Args:
        stats: the statistics.
        layers: decoder layers of the model, dense ones too.
    """
    import torch

    peaks = {layer: stats.peak(layer) for layer in stats.layers}
    every = torch.cat(list(peaks.values()))
    limit = max(float(torch.quantile(every, _QUANTILE)), _OF_LARGEST * float(every.max()))
    found = {i: (p > limit).nonzero().flatten().tolist() for i, p in peaks.items()}
    return {i: tuple(e) for i, e in found.items() if e and i < _FIRST_LAYERS * layers}


def _agreement(stats: ExpertStats, options: PruneOptions, share: float) -> str:
    """How far the two halves of the text agree on what is kept, in words."""
    from moe_compose.calibration.criteria import convergence

    if share >= 1 or not all(stats.tokens(half=half) for half in (0, 1)):
        return ""
    found = [convergence(stats, i, share, options.criterion) for i in stats.layers]
    jaccard = sum(c.jaccard for c in found) / len(found)
    tau = sum(c.tau for c in found) / len(found)
    text = (
        f"ranked on {stats.tokens():,} tokens; two halves of them agree on what is kept: "
        f"Jaccard {jaccard:.2f}, Kendall τ {tau:.2f} (means over the layers; 1 is the same)"
    )
    return text if jaccard >= _ENOUGH else f"{text}. More text would decide better"


def check_statistics(stats: ExpertStats, source: TensorSource) -> None:
    """Also hold the statistics to the routers' weights, where these are on this machine: another
    fine-tune has the same names and shapes. Reads some megabytes.

    Raises:
        CheckpointError: they were measured on another checkpoint.
    """
    stats.check(source, weights=bool(source.weight_files))
