"""Which tensors belong to which expert, and which have a row for each, by the templates of a
family's form.

Names are taken apart at the layer. What stands before is a *block* (`model.layers.3`); what follows
(`mlp.experts.7.up_proj.weight`) is the same in all blocks, those of multi-token prediction
included, whose own names differ (`mtp.layers.0`). Whatever follows an expert's number is taken to
be the expert's: scales, packed weights, zero points, under any name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moe_compose.architectures import Architecture
from moe_compose.architectures.base import RouterTensor
from moe_compose.architectures.parts import TAIL

#: A number behind the word: an expert's, whoever named it. Shared experts are told by their word.
NUMBERED = re.compile(r"(?<![A-Za-z_])experts?\.(\d+)(?=\.|$)")

_BLOCK = r"(?P<block>.+?)\."


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is to the experts of its block.

    Attributes:
        block: everything before the form's templates: `model.layers.3`.
        kind: `expert`: it belongs to one; `stacked`: it holds all of them; `router`: it has a row
            or an entry for each.
        stem, expert, rest: of an `expert`, its name in three: `{stem}{expert}{rest}`.
        router: of a `router`, its line in the form.
        exact: the form names it; otherwise it is a companion (a scale) of what the form names.
    """

    block: str
    kind: Literal["expert", "stacked", "router"]
    stem: str = ""
    expert: int = -1
    rest: str = ""
    router: RouterTensor | None = None
    exact: bool = True

    def renamed(self, expert: int) -> str:
        """The name as that of another expert."""
        return f"{self.stem}{expert}{self.rest}"


class Roles:
    """Finds the role of a tensor by its name.

    Args:
        form: the family's, in the layout that the checkpoint has.
    """

    def __init__(self, form: Architecture) -> None:
        assert form.experts is not None
        matrices = (*form.experts.names, *form.experts.biases)
        numbered = {_tail(n).partition("{e}")[0] for n in matrices if "{e}" in n}
        self._prefix = form.experts.down.partition("{i}")[0]
        self._routers = [(t, _exactly(t.name)) for t in form.router]
        self._numbered = [
            re.compile(rf"(?P<stem>{_BLOCK}{re.escape(stem)})(?P<e>\d+)(?P<rest>(?:\..+)?)$")
            for stem in sorted(numbered)
        ]
        self._stacked = [(_exactly(n), _loosely(n)) for n in matrices if "{e}" not in n]
        self._companions = [(t, _loosely(t.name)) for t in form.router if t.kind == "weight"]

    def block(self, layer: int) -> str:
        """The block of a decoder layer."""
        return f"{self._prefix}{layer}"

    def of(self, name: str) -> Role | None:
        """The role of a tensor, or of a module that a config names; None if it has none.

        >>> from moe_compose.architectures import all_architectures
        >>> roles = Roles(all_architectures()["qwen3_moe"])
        >>> role = roles.of("model.layers.3.mlp.experts.7.up_proj.weight_scale_inv")
        >>> role.block, role.expert, role.renamed(2)
        ('model.layers.3', 7, 'model.layers.3.mlp.experts.2.up_proj.weight_scale_inv')
        """
        return next(self._found(name), None)

    def _found(self, name: str) -> Iterator[Role]:
        for router, pattern in self._routers:
            if m := pattern.match(name):
                yield Role(m["block"], "router", router=router)
        for pattern in self._numbered:
            if m := pattern.match(name):
                yield Role(m["block"], "expert", m["stem"], int(m["e"]), m["rest"])
        for exact, loose in self._stacked:
            if m := loose.match(name):
                yield Role(m["block"], "stacked", exact=exact.match(name) is not None)
        for router, pattern in self._companions:
            if m := pattern.match(name):
                yield Role(m["block"], "router", router=router, exact=False)


def _tail(template: str) -> str:
    """What follows the layer's number."""
    return template.partition("{i}.")[2]


def _exactly(template: str) -> re.Pattern[str]:
    return re.compile(f"{_BLOCK}{re.escape(_tail(template))}$")


def _loosely(template: str) -> re.Pattern[str]:
    return re.compile(f"{_BLOCK}{re.escape(_tail(template).removesuffix('.weight'))}{TAIL}")
