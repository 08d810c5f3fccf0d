"""Anchor: the pair of experts that one domain is trained in (FlexOlmo, arXiv 2507.07024; BAR, arXiv
2604.18473, section 3).

Expert 0 is the base's own FFN and stays as it is; expert 1 starts as its copy and trains on the
domain. What trains beside it depends on the stage, which `freeze.json` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.expert_names import name_problem, set_names
from moe_compose.surgery.expert_options import AnchorOptions
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

#: What to freeze in each stage, beside the result.
FREEZE_NAME = "freeze.json"

#: Experts that stay, and the shared parts of the model (`embedding`, `head`, `attention`, `norm`,
#: ...; or `all`) that train in each stage.
FREEZE: Mapping[str, Any] = {
    "anchors": [0],
    "stages": {"mid": [], "sft": ["embedding", "head"], "rl": ["all"]},
}


def anchor(base: TensorSource, options: AnchorOptions) -> Plan:
    """Plan the pair that an expert is trained in. Reads no weights.

    Args:
        base: a dense checkpoint.
        options: see `AnchorOptions`.

    Returns:
        A checked plan, exact: both experts compute what the base's FFN does, and both are chosen
        for every token. `freeze.json` is written beside it.

    Raises:
        OptionError: a name that cannot be.
        UnsupportedError: the base has no exact target.
    """
    if problems := list(_problems(options)):
        raise OptionError("these options cannot be meant", problems=problems)
    plan = upcycle(
        base,
        UpcycleOptions(num_experts=2, top_k=2, target=options.target, seed=options.seed),
    )
    config = dict(plan.config)
    set_names(config, ["base", options.name])
    notes = (
        "train expert 1 and its router row: moe_compose.training.freeze(model, stage) freezes the "
        "rest",
    )
    return replace(
        plan,
        operation="anchor",
        options=asdict(options),
        config=config,
        notes=notes,
        reports={FREEZE_NAME: dict(FREEZE)},
    ).check()


def _problems(options: AnchorOptions) -> Iterator[str]:
    if problem := name_problem(options.name, ["base"]):
        yield problem
