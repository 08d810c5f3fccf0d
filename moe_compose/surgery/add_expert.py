"""Add an expert to an MoE, from wherever it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal

from moe_compose.architectures import MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.donors import Donor, Giver
from moe_compose.surgery.expert_names import index_of, name_problem, names_of
from moe_compose.surgery.expert_options import ADD_ROUTERS, AddOptions
from moe_compose.surgery.placing import Place, own_places, place_experts, sources_of
from moe_compose.surgery.plan import UNTRAINED, Plan, Preservation
from moe_compose.surgery.prune import count_note
from moe_compose.surgery.selected_config import with_top_k
from moe_compose.surgery.selection import moe_form

#: The plan's word for where the new expert comes from.
DONOR = "donor"


def add_expert(source: TensorSource, donor: Donor, options: AddOptions) -> Plan:
    """Plan an MoE with one more expert, the last. Reads no weights.

    The other experts, and all that is shared, keep their bytes; so removing the new one gives the
    same bytes again.

    Args:
        source: an MoE.
        donor: where the expert comes from.
        options: what it is called, and how its row starts; rows that text decides (`ridge`,
            `hidden`, `off`) are copied here, and replaced in the result.

    Returns:
        A checked plan.

    Raises:
        OptionError: options that cannot be meant, all faults at once.
        UnsupportedError: an expert that does not fit, every difference named.

    Example:
        >>> plan = add_expert(moe, Donor.parse("copy:3"), AddOptions(name="law"))  # doctest: +SKIP
    """
    form, moe = moe_form(source)
    names = names_of(source.config, moe.num_experts)
    if problems := list(_problems(options, donor, moe, names)):
        raise OptionError(f"cannot add an expert to {source.label} like this", problems=problems)
    giver = Giver.of(donor, DONOR, source)
    own = giver.source is source and donor.adapter is None
    copied = giver.expert if giver.source is source and giver.expert is not None else 0
    like = copied if options.like is None else index_of(source.config, len(names), options.like)
    row: Literal["own", "trained"] = "trained" if options.router == "trained" else "own"
    assert giver.expert is not None or not own
    new = Place(copied) if own and like == copied else Place(like, giver, row, fresh=not own)
    places = [*own_places(moe.num_experts), new]
    selected = place_experts(source, places, [*names, options.name], mtp=options.mtp)
    top_k = options.top_k or moe.top_k
    notes = [UNTRAINED]
    if options.router in (None, "copy") and donor.source is not None:
        notes.append(f"its router row is that of expert {like}: give text for one of its own")
    return Plan(
        operation="add-expert",
        options={**asdict(options), "from": donor.label},
        config=with_top_k(selected.config, form, top_k),
        outputs=selected.outputs,
        sources=sources_of(source, places),
        preservation=Preservation(
            "none",
            f"expert {moe.num_experts} is added ({donor.label}); the others keep their bytes",
        ),
        files={n: p for n, p in source.files.items() if n != "README.md"},
        dropped=selected.dropped,
        notes=(*notes, *filter(None, [count_note(form, moe.num_experts + 1)])),
        card=source.files.get("README.md"),
        decided={"expert": moe.num_experts, "row_like": like},
    ).check()


def _problems(
    options: AddOptions, donor: Donor, moe: MoE, names: tuple[str | None, ...]
) -> Iterator[str]:
    if options.name is not None and (problem := name_problem(options.name, names)):
        yield problem
    if options.router not in (None, *ADD_ROUTERS):
        yield f"router ({options.router}) must be one of {', '.join(ADD_ROUTERS)}"
    if options.rows not in ("new", "all"):
        yield f"rows ({options.rows}) must be new or all"
    if options.rows == "all" and options.router not in (None, "ridge"):
        yield f"rows = all solves them by ridge: it has no meaning for router = {options.router}"
    if options.router == "trained" and donor.source is None:
        yield "router = trained takes the row of another mixture; use copy for one of this"
    if options.top_k is not None and not 1 <= options.top_k <= moe.num_experts + 1:
        yield f"top_k ({options.top_k}) must be between 1 and {moe.num_experts + 1}"
    if donor.source is None and donor.expert is None:
        yield f"{donor.label} is an adapter: say on what (copy:0+{donor.label}, MODEL+...)"
