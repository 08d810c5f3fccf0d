"""Parts of a model as tensors in memory, and rows of them.

transformers stacks experts that lie one by one on disk. So an expert is a tensor, or rows of one:
which, is seen from where its tensors on disk go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from moe_compose.architectures import Architecture, MoE
from moe_compose.errors import OptionError
from moe_compose.training.parts import Parts

#: Name in memory → rows along its first dimension; None: all of it.
Chosen = dict[str, tuple[int, ...] | None]

#: Name on disk → name in memory; None where the class has no use for it.
Target = Callable[[str], str | None]

#: Of the router's tensors, those that no gradient reaches.
_WITHOUT_GRADIENT = ("correction_bias", "table")


class Places:
    """Where the parts of a model are in memory.

    Args:
        form: of its family, in the layout that it has on disk.
        moe: what its config says.
        target_of: name on disk → name in memory.
        tensors: what is in memory.
    """

    def __init__(
        self, form: Architecture, moe: MoE, target_of: Target, tensors: Mapping[str, Tensor]
    ) -> None:
        self._form, self._moe, self._tensors = form, moe, tensors
        self._target_of = target_of

    def routers(self) -> Iterator[str]:
        """Every tensor of every router that gradients reach."""
        for t in self._form.router:
            if t.kind not in _WITHOUT_GRADIENT:
                yield from self._each(t.name)

    def router_rows(self, expert: int) -> Chosen:
        """An expert's row of every router."""
        kinds = {t.name: t for t in self._form.router if t.kind in ("weight", "bias", "scale")}
        return {n: (expert,) for name in kinds for n in self._each(name)}

    def correction_biases(self) -> Iterator[tuple[int, str]]:
        """Layer and name of every correction bias."""
        for t in self._form.router:
            if t.kind == "correction_bias":
                for layer in self._moe.sparse_layers:
                    if (name := self._name(t.name.format(i=layer))) is not None:
                        yield layer, name

    def expert(self, expert: int) -> Chosen:
        """An expert's matrices and biases in every sparse layer."""
        matrices, found = self._form.experts, Chosen()
        assert matrices is not None
        for template in (*matrices.names, *matrices.biases):
            for layer in self._moe.sparse_layers:
                name = self._name(template.format(i=layer, e=expert))
                if name is not None:
                    found[name] = self._rows(name, template, layer, expert)
        return found

    def named(self, name: str) -> str | None:
        """The tensor in memory of one on disk."""
        return self._name(name)

    def _each(self, template: str) -> Iterator[str]:
        for layer in self._moe.sparse_layers:
            if (name := self._name(template.format(i=layer))) is not None:
                yield name

    def _name(self, on_disk: str) -> str | None:
        name = self._target_of(on_disk)
        return name if name in self._tensors else None

    def _rows(self, name: str, template: str, layer: int, expert: int) -> tuple[int, ...] | None:
        """None where the expert has the tensor for itself."""
        count = self._moe.num_experts
        other = self._name(template.format(i=layer, e=(expert + 1) % count))
        if other != name or count == 1:
            return None
        each = self._tensors[name].shape[0] // count
        return tuple(range(expert * each, (expert + 1) * each))


def choose(places: Places, parts: Parts, moe: MoE, tensors: Mapping[str, Tensor]) -> Chosen:
    """What `--train` means for a model.

    Raises:
        OptionError: experts that it does not have.
    """
    if parts.everything:
        by_hand = {name for _, name in places.correction_biases()}
        weights = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
        return dict.fromkeys(n for n in weights if n not in by_hand)
    absent = [e for e in parts.experts if e >= moe.num_experts]
    if absent:
        raise OptionError(
            f"train names experts {', '.join(map(str, absent))}, and there are {moe.num_experts} "
            f"(0 to {moe.num_experts - 1})"
        )
    found: Chosen = dict.fromkeys(places.routers())
    for expert in parts.experts:
        for name, rows in places.expert(expert).items():
            found[name] = None if rows is None else (*(found.get(name) or ()), *rows)
    return found
