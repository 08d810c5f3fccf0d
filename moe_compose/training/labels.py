"""Which expert belongs to a text's domain, for the objective `domain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_compose.calibration.data import UNNAMED
from moe_compose.errors import OptionError
from moe_compose.surgery.expert_names import ENTRY, names_of


def experts_of_domains(
    domains: Sequence[str], config: Mapping[str, Any], experts: int
) -> dict[str, int]:
    """Domain → expert: by `expert_names` of `config.json`, or in the order of the domains.

    Args:
        domains: of the text that is trained on.
        config: the model's.
        experts: how many it has.

    Raises:
        OptionError: text without domains, names that no expert has or several have, or, where
            experts have no names, another number of domains than of experts.

    Example:
        >>> experts_of_domains(["py"], {"expert_names": ["base", "py"]}, 2)
        {'py': 1}
    """
    if tuple(domains) == (UNNAMED,):
        raise OptionError(
            "the objective domain needs text by domain", hint="Give --domain NAME=FILE for each."
        )
    names = names_of(config, experts)
    if not any(names):
        if len(domains) != experts:
            raise OptionError(
                f"{len(domains)} domains and {experts} experts: which expert is whose is not known",
                hint=f"Name the experts in config.json ({ENTRY}: a list in their order), or give a "
                "domain for every expert, in their order.",
            )
        return {domain: i for i, domain in enumerate(domains)}
    wrong = [d for d in domains if names.count(d) != 1]
    if wrong:
        known = ", ".join(n for n in names if n)
        raise OptionError(
            f"no single expert is named like {', '.join(wrong)}",
            hint=f"Name domains like experts: {known}.",
        )
    return {domain: names.index(domain) for domain in domains}
