"""Swap an expert of an MoE for another: the upgrade of BAR (arXiv 2604.18473, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.add_expert import DONOR
from moe_compose.surgery.donors import Donor, Giver
from moe_compose.surgery.expert_names import index_of, name_problem, names_of
from moe_compose.surgery.expert_options import SWAP_ROUTERS, SwapOptions
from moe_compose.surgery.placing import Place, own_places, place_experts, sources_of
from moe_compose.surgery.plan import UNTRAINED, Plan, Preservation
from moe_compose.surgery.selection import moe_form


def swap_expert(source: TensorSource, donor: Donor, options: SwapOptions) -> Plan:
    """Plan an MoE with another expert in the place of one. Reads no weights.

    All else keeps its bytes.

    Args:
        source: an MoE.
        donor: where the new expert comes from.
        options: which expert goes, and what becomes of its row; rows that text decides (`ridge`,
            `hidden`) are kept here, and replaced in the result.

    Returns:
        A checked plan.

    Raises:
        OptionError: options that cannot be meant, all faults at once.
        UnsupportedError: an expert that does not fit, every difference named.
    """
    _, moe = moe_form(source)
    names = list(names_of(source.config, moe.num_experts))
    if problems := list(_problems(options, donor, names)):
        raise OptionError(f"cannot swap an expert of {source.label} like this", problems=problems)
    at = index_of(source.config, len(names), options.expert)
    giver = Giver.of(donor, DONOR, source)
    place = Place(at, giver, "trained" if options.router == "trained" else "own")
    names[at] = options.name or names[at]
    places = own_places(moe.num_experts, {at: place})
    selected = place_experts(source, places, names)
    return Plan(
        operation="swap-expert",
        options={**asdict(options), "from": donor.label},
        config=selected.config,
        outputs=selected.outputs,
        sources=sources_of(source, places),
        preservation=Preservation(
            "none", f"expert {at} is replaced ({donor.label}); the others keep their bytes"
        ),
        files={n: p for n, p in source.files.items() if n != "README.md"},
        dropped=selected.dropped,
        notes=(UNTRAINED,),
        card=source.files.get("README.md"),
        decided={"expert": at},
    ).check()


def _problems(options: SwapOptions, donor: Donor, names: list[str | None]) -> Iterator[str]:
    others = [n for n in names if n != options.expert]
    if options.name is not None and (problem := name_problem(options.name, others)):
        yield problem
    if options.router not in SWAP_ROUTERS:
        yield f"router ({options.router}) must be one of {', '.join(SWAP_ROUTERS)}"
    if donor.source is None and donor.expert is None:
        yield f"{donor.label} is an adapter: say on what (copy:0+{donor.label}, MODEL+...)"
