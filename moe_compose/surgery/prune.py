"""Prune: an MoE with fewer experts, the others gone with all that is theirs.

Router rows, biases and scales go with their experts; the kept ones, in their old order, keep their
bytes. The result computes exactly what the source computes with the removed experts masked out of
its routers: nothing else is promised, and that is what `validate` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from moe_compose.architectures import Architecture, MoE
from moe_compose.architectures.family import USUAL_COUNTS
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.plan import UNTRAINED, Plan, Preservation
from moe_compose.surgery.prune_options import (
    PruneOptions,
    allowed_counts,
    kept_count,
    option_problems,
)
from moe_compose.surgery.ranking import Ranking
from moe_compose.surgery.selection import Selected, moe_form, select_experts
from moe_compose.surgery.sizing import count_within, size_note

#: The explanation of a pruning, beside the result.
REPORT_NAME = "pruning.json"

Kept = Mapping[int, Sequence[int]]


def check_options(source: TensorSource, options: PruneOptions) -> None:
    """Raise all faults of the options together, before anything is read to rank experts by.

    Raises:
        OptionError: options that cannot be meant.
        UnsupportedError: no MoE, or one whose experts cannot be selected.
    """
    _, moe = moe_form(source)
    if problems := list(option_problems(options, moe)):
        raise OptionError(f"cannot prune {source.label} like this", problems=problems)
    sized(source, options)


def sized(source: TensorSource, options: PruneOptions) -> PruneOptions:
    """The options with the largest `keep` that stays within `size`, where that is asked.

    Raises:
        OptionError: no count is within it.
    """
    if options.size is None:
        return options
    counts = allowed_counts(options, moe_form(source)[1])
    count = count_within(source, options.size, counts, options.mtp)
    return replace(options, keep=count, size=None)


def prune_ranked(source: TensorSource, ranking: Ranking, options: PruneOptions) -> Plan:
    """Plan an MoE that keeps the best of a ranking. Reads no weights.

    Args:
        source: an MoE.
        ranking: what its experts are worth.
        options: how many to keep, and what to do about multi-token prediction.

    Returns:
        A checked plan. `plan.decided` says what is kept, `plan.reports` why the others are not.

    Raises:
        OptionError: options that cannot be meant, or a ranking of something else; all faults.
        UnsupportedError: experts of this family, or these tensors, cannot be selected.
    """
    form, moe = moe_form(source)
    problems = [
        *option_problems(options, moe),
        *ranking.problems(moe.num_experts, moe.sparse_layers),
    ]
    options = options if problems else sized(source, options)
    count = 0 if problems else kept_count(options, moe)
    problems += [] if problems else _guard_problems(ranking, moe, count)
    if problems:
        raise OptionError(f"cannot prune {source.label} like this", problems=problems)
    kept = {layer: best(ranking, layer, count, groups_of(moe)) for layer in moe.sparse_layers}
    selected = select_experts(source, kept, mtp=options.mtp)
    removed = moe.num_experts - count
    plan = Plan(
        operation="prune",
        options=_plain(options),
        config=selected.config,
        outputs=selected.outputs,
        sources={"source": source},
        preservation=_preservation(removed, moe),
        files={n: p for n, p in source.files.items() if n not in ("README.md", REPORT_NAME)},
        dropped=selected.dropped,
        notes=(
            *_notes(form, moe, count, selected, options, ranking),
            *([size_note(source, _bytes_of(selected), count)] if removed else []),
        ),
        card=source.files.get("README.md"),
        decided=_decided(kept, selected, ranking),
        reports={REPORT_NAME: _report(kept, ranking, moe)},
    )
    return plan.check()


def groups_of(moe: MoE) -> int:
    """Groups that the router chooses among first; 1 where it does not."""
    return moe.routing.groups if moe.routing.grouped else 1


def best(ranking: Ranking, layer: int, count: int, groups: int = 1) -> tuple[int, ...]:
    """The experts of a layer to keep, ascending: as many in each group, the guarded first."""
    order, guarded = ranking.order(layer), ranking.guarded.get(layer, ())
    size = len(order) // groups
    first = sorted(order, key=lambda e: e not in guarded)  # stable: the order within stays
    kept = [
        e for g in range(groups) for e in [x for x in first if x // size == g][: count // groups]
    ]
    return tuple(sorted(kept))


def explain(ranking: Ranking, kept: Kept, groups: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Layer → its removed experts, best first: `expert`, `rank` (1 is the best of the layer),
    `worth`, and `why` it is not kept.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for layer, ids in sorted(kept.items()):
        order, worth = ranking.order(layer), ranking.worths[layer]
        guards = [e for e in ranking.guarded.get(layer, ()) if e in ids]
        rows, size = [], len(order) // groups
        for rank, e in enumerate(order, 1):
            if e in ids:
                continue
            rivals = [x for x in order if x // size == e // size]
            place, room = rivals.index(e) + 1, len(ids) // groups
            why = f"rank {place} of {len(rivals)}; {room} are kept"
            if groups > 1:
                why = f"in group {e // size}: {why}"
            if place <= room:
                taken = [x for x in guards if x // size == e // size and rivals.index(x) >= room]
                why += f"; guarded experts ({', '.join(map(str, taken))}) took the place"
            rows.append({"expert": e, "rank": rank, "worth": worth[e], "why": why})
        found[str(layer)] = rows
    return found


def count_note(form: Architecture, count: int) -> str:
    """What engines make of a number of experts, where that is worth saying."""
    if count in USUAL_COUNTS:
        return ""
    who = form.usual_counts
    return f"{count} experts: " + (
        f"{who} accept powers of two up to 512, and 192, 320, 384, 448, 576 only"
        if who
        else "runs everywhere; vLLM on a GPU is faster with powers of two up to 512, and with "
        "192, 320, 384, 448, 576"
    )


def _guard_problems(ranking: Ranking, moe: MoE, count: int) -> Iterator[str]:
    groups = groups_of(moe)
    size = moe.num_experts // groups
    for layer, guarded in ranking.guarded.items():
        most = max(sum(e // size == g for e in guarded) for g in range(groups))
        if most > count // groups:
            where = f"layer {layer}" + (", in one group" if groups > 1 else "")
            yield (
                f"{where}: {most} guarded experts ({', '.join(map(str, guarded))}) are more than "
                f"the {count // groups} that stay; keep more, or super_experts = ignore"
            )


def _bytes_of(selected: Selected) -> int:
    return sum(o.info.nbytes for o in selected.outputs)


def _plain(options: PruneOptions) -> dict[str, Any]:
    """Options as the record holds them: of a file only its name."""
    name = options.ranking.name if options.ranking is not None else None
    return {**asdict(options), "ranking": name}


def _preservation(removed: int, moe: MoE) -> Preservation:
    if not removed:
        return Preservation("exact", "no expert is removed")
    return Preservation(
        "none",
        f"{removed} of {moe.num_experts} experts a layer are removed; exactly the source with "
        "those experts masked out of its routers",
    )


def _decided(kept: Kept, selected: Selected, ranking: Ranking) -> dict[str, Any]:
    """For the record: what is kept, and by what."""
    decided: dict[str, Any] = {
        "criterion": ranking.criterion,
        "of": dict(ranking.of),
        "kept": {str(layer): list(ids) for layer, ids in kept.items()},
    }
    if guarded := {str(i): list(g) for i, g in ranking.guarded.items() if g}:
        decided["guarded"] = guarded
    if selected.mtp:
        decided["kept_mtp"] = {block: list(ids) for block, ids in selected.mtp.items()}
    return decided


def _report(kept: Kept, ranking: Ranking, moe: MoE) -> dict[str, Any]:
    return {
        "criterion": ranking.criterion,
        "of": dict(ranking.of),
        "kept": {str(layer): list(ids) for layer, ids in kept.items()},
        "guarded": {str(layer): list(ids) for layer, ids in ranking.guarded.items() if ids},
        "removed": explain(ranking, kept, groups_of(moe)),
        "ranking": ranking.orders(),
    }


def _notes(
    form: Architecture,
    moe: MoE,
    count: int,
    selected: Selected,
    options: PruneOptions,
    ranking: Ranking,
) -> Iterator[str]:
    yield UNTRAINED
    yield from ranking.notes
    if count == moe.num_experts:
        return
    if note := count_note(form, count):
        yield note
    if selected.mtp and options.mtp == "prune":
        yield (
            f"multi-token prediction ({', '.join(selected.mtp)}) keeps the experts with the ids of "
            "the last layer's: nothing was measured there. What the model says does not depend on "
            "it; fewer of its drafts may be accepted"
        )
    if any(t.kind == "table" for t in form.router) and moe.routing.hashed_layers:
        yield (
            f"{moe.routing.hashed_layers} layers route by token id: tokens of a removed expert go "
            "to the next one that is kept and that they do not have"
        )
