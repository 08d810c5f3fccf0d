"""A model on the meta device as slots that tensors are put into and taken out of, sorted by what
runs them: one of the decoder layers, or a module outside of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moe_compose.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Modules that are never called: their tensors belong to whoever holds them.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor goes: an attribute of a module, and what stands there meanwhile."""

    home: nn.Module
    attribute: str
    empty: Tensor


class Skeleton:
    """The slots of a model.

    Args:
        model: built on the meta device.

    Attributes:
        layers: the decoder layers, in order.
        shapes: name in memory → shape, of every tensor that a checkpoint holds for the class.
        of_layer: for each layer, the names of its tensors.
        outside: names of the tensors that belong to no layer, by the module that is called when
            they are used.

    Raises:
        UnsupportedError: no list of decoder layers is found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        path, layers = _decoder_layers(model)
        self.layers: tuple[nn.Module, ...] = tuple(layers)
        self._slots = {name: _slot(model, name) for name in model.state_dict()}
        self.shapes = {name: slot.empty.shape for name, slot in self._slots.items()}
        self.of_layer: list[list[str]] = [[] for _ in layers]
        self.outside: dict[nn.Module, list[str]] = {}
        for name in self._slots:
            rest = name.removeprefix(f"{path}.")
            if rest != name:
                self.of_layer[int(rest.partition(".")[0])].append(name)
            else:
                self.outside.setdefault(_caller(model, name), []).append(name)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill slots, by name in memory."""
        for name, tensor in tensors.items():
            slot = self._slots[name]
            if slot.attribute in slot.home._buffers:
                slot.home._buffers[slot.attribute] = tensor
            else:
                parameter = nn.Parameter(tensor, requires_grad=False)
                slot.home._parameters[slot.attribute] = parameter

    def empty(self, names: Iterable[str]) -> None:
        """Take tensors out again: the slots are as they were built."""
        for name in names:
            slot = self._slots[name]
            if slot.attribute in slot.home._buffers:
                slot.home._buffers[slot.attribute] = slot.empty
            else:
                assert isinstance(slot.empty, nn.Parameter)
                slot.home._parameters[slot.attribute] = slot.empty

    def home_of(self, name: str) -> nn.Module:
        """The module that holds a tensor."""
        return self._slots[name].home

    def is_empty(self, name: str) -> bool:
        """Whether a slot waits for its tensor."""
        slot = self._slots[name]
        return getattr(slot.home, slot.attribute) is slot.empty


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of modules with the most parameters that lies in no other list, and its path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[path] = module
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder layers")
    path = max(found, key=lambda p: sum(t.numel() for t in found[p].parameters()))
    return path, found[path]


def _slot(model: PreTrainedModel, name: str) -> _Slot:
    home, _, attribute = name.rpartition(".")
    module = model.get_submodule(home)
    return _Slot(module, attribute, getattr(module, attribute))


def _caller(model: PreTrainedModel, name: str) -> nn.Module:
    """The module whose call uses a tensor outside of the layers."""
    path = name.rpartition(".")[0]
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    module: nn.Module = model.get_submodule(path)
    return module
