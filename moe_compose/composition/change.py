"""Experts added, swapped and removed, with router rows that follow from text, or from statistics
that were kept: nobody's old text is needed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.kept import SEARCH_NAME, stats_of, with_stats
from moe_compose.composition.options import RoutingOptions, idle_text
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery import add_expert as adding
from moe_compose.surgery import remove_expert as removing
from moe_compose.surgery import swap_expert as swapping
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.expert_names import names_of
from moe_compose.surgery.expert_options import AddOptions, AddRouter, RemoveOptions, SwapOptions
from moe_compose.surgery.history import read_json
from moe_compose.surgery.pack_expert import ARTIFACT_NAME
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.selection import moe_form

if TYPE_CHECKING:
    from moe_compose.calibration.texts import Texts

#: Tells how far a measurement is: layers done, layers in all.
Progress = Callable[[int, int], None]

Given = Mapping[str, "Texts"]


def add_expert(
    source: TensorSource,
    donor: Donor | TensorSource,
    options: AddOptions | None = None,
    texts: Given | None = None,
    *,
    routing: RoutingOptions | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan an MoE with one more expert, the last.

    The other experts, and all that is shared, keep their bytes; their router rows too, unless
    `rows = all` solves them again.

    Args:
        source: an MoE.
        donor: where the expert comes from; a checkpoint is its own donor.
        options: see `AddOptions`.
        texts: name of an expert → text. The new expert's own makes its row; that of other domains
            is only measured on: the row is as long as leaves their loss within the tolerance.
        routing: how rows follow from text.
        progress: told after every layer that is measured.

    Returns:
        A checked plan, with statistics beside its result where there are any.

    Raises:
        OptionError: options that cannot be meant, or text that is missing; all faults at once.
        UnsupportedError: an expert that does not fit, every difference named; or a packed one that
            was made for another base.

    Example:
        >>> mc.add_expert(moe, mc.Donor.parse("law/"), mc.AddOptions(name="law"),  # doctest: +SKIP
        ...               {"law": statutes})
    """
    given = donor if isinstance(donor, Donor) else Donor(donor.label, donor)
    options = options or AddOptions()
    at = moe_form(source)[1].num_experts
    name = options.name or str(at)
    router = router_of(given, options, texts, name)
    if problems := idle_text(texts, router):
        raise OptionError("these options cannot be meant", problems=problems)
    settled = replace(options, router=cast(AddRouter, router))
    plan = adding.add_expert(source, given, settled)
    check_base(source, given)
    if router in ("copy", "trained"):
        return plan
    from moe_compose.composition.new_row import NewRow

    row = NewRow(source, plan, at, name, given, texts or {}, routing or RoutingOptions(), progress)
    if router == "off":
        return row.off()
    return row.plan("hidden" if router == "hidden" else "ridge", every=options.rows == "all")


def swap_expert(
    source: TensorSource,
    donor: Donor | TensorSource,
    options: SwapOptions,
    texts: Given | None = None,
    *,
    routing: RoutingOptions | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan an MoE with another expert in the place of one: the upgrade of BAR (2604.18473).

    Args:
        source: an MoE.
        donor: where the new expert comes from.
        options: see `SwapOptions`.
        texts: as for `add_expert`.
        routing: how rows follow from text.
        progress: told after every layer that is measured.

    Returns:
        A checked plan. Statistics of the expert that went are gone with it.

    Raises:
        OptionError, UnsupportedError: as for `add_expert`.
    """
    given = donor if isinstance(donor, Donor) else Donor(donor.label, donor)
    if problems := idle_text(texts, options.router):
        raise OptionError("these options cannot be meant", problems=problems)
    plan = swapping.swap_expert(source, given, options)
    check_base(source, given)
    at = int(plan.decided["expert"])
    _, moe = moe_form(plan)
    if options.router in ("keep", "trained"):
        return plan
    from moe_compose.composition.new_row import NewRow

    name = names_of(plan.config, moe.num_experts)[at] or str(at)
    row = NewRow(source, plan, at, name, given, texts or {}, routing or RoutingOptions(), progress)
    return row.plan("hidden" if options.router == "hidden" else "ridge", every=False)


def remove_expert(source: TensorSource, options: RemoveOptions) -> Plan:
    """Plan an MoE without some experts, and without any trace of their text.

    Args:
        source: an MoE.
        options: see `RemoveOptions`.

    Returns:
        A checked plan: exactly the source with those experts masked. Router statistics, where there
        are any, go on without theirs.

    Raises:
        OptionError: options that cannot be meant, all faults at once.
        UnsupportedError: a selection that the family cannot hold.
    """
    plan = removing.remove_expert(source, options)
    plan = replace(plan, files={n: p for n, p in plan.files.items() if n != SEARCH_NAME})
    stats = stats_of(source)
    if stats is None:
        return plan
    _, moe = moe_form(source)
    kept = set(next(iter(plan.decided["kept"].values())))
    names = [n for e, n in enumerate(stats.names) if e in kept]
    return with_stats(plan, stats.select(names)) if len(stats.names) == moe.num_experts else plan


def check_base(source: TensorSource, donor: Donor) -> None:
    """Hold a packed expert to the model that it was made for. Reads the model's shared tensors.

    Raises:
        UnsupportedError: another base.
        CheckpointError: a damaged artifact.
    """
    path = donor.source.files.get(ARTIFACT_NAME) if donor.source is not None else None
    if path is None:
        return
    from moe_compose.composition.forcing import Routers
    from moe_compose.composition.measure import shared_digest

    said = read_json(path, donor.label)
    wanted = said.get("base") if isinstance(said, Mapping) else None
    found = shared_digest(source, Routers.of(source))
    if wanted is not None and wanted != found:
        raise UnsupportedError(
            f"{donor.label} was packed for another base (shared tensors {str(wanted)[:12]}, "
            f"{source.label} has {found[:12]})",
            hint="An expert works beside the shared parameters that it was trained with.",
        )


def router_of(
    donor: Donor, options: AddOptions | SwapOptions, texts: Given | None, name: str
) -> str:
    """How the row of a new expert starts, where the options leave it open too."""
    by_text = _own(texts, name) is not None or _packed_stats(donor) is not None
    return options.router or ("ridge" if by_text else "copy")


def _own(texts: Given | None, name: str) -> Texts | None:
    return (texts or {}).get(name)


def _packed_stats(donor: Donor) -> object | None:
    """Statistics that came with a packed expert."""
    if donor.source is None or ARTIFACT_NAME not in donor.source.files:
        return None
    return stats_of(donor.source)
