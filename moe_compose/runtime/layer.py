"""What observers of a run are shown: a decoder layer that is real for a moment, and the batch that
passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_compose.errors import OptionError
from moe_compose.runtime import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences that run together.

    Attributes:
        ids: token ids, int64 `[B, S]`.
        mask: 1 for tokens, 0 for padding, `[B, S]`; None where nothing is padded.
    """

    ids: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, given: Batch | Tensor) -> Batch:
        """The batch itself, or token ids as a batch without padding.

        Raises:
            OptionError: ids that are not `[B, S]` integers, or a mask of another shape.
        """
        batch = given if isinstance(given, Batch) else cls(given)
        if batch.ids.ndim != 2 or batch.ids.dtype != torch.int64 or not batch.ids.numel():
            found = f"{batch.ids.dtype} of shape {list(batch.ids.shape)}"
            raise OptionError(f"token ids must be int64 [batch, length] and not empty ({found})")
        if batch.mask is not None and batch.mask.shape != batch.ids.shape:
            shapes = f"{list(batch.mask.shape)} and {list(batch.ids.shape)}"
            raise OptionError(f"mask and token ids must have one shape ({shapes})")
        return batch


@dataclass(slots=True, eq=False)
class Layer:
    """A decoder layer.

    Attributes:
        index: which one.
        module: transformers' own, with hooks of its own.
        experts: the module that computes the routed experts, called with hidden states `[T, D]`,
            indices `[T, k]` and weights `[T, k]`; None in a dense layer, and in families that
            compute their experts elsewhere.
        router: the module whose output transformers records as router logits, or else the one that
            holds the router's weight; None in a dense layer.
        batch: the batch that runs through the layer now; None between batches.
        index_of_batch: its place among the batches of the run.
    """

    index: int
    module: nn.Module
    experts: nn.Module | None = None
    router: nn.Module | None = None
    batch: Batch | None = None
    index_of_batch: int = -1


def layers_of(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    router_of: Callable[[int], nn.Module | None],
) -> tuple[Layer, ...]:
    """The decoder layers of a model, with the parts that observers ask for.

    Args:
        model: on the meta device.
        modules: the decoder layers, in order.
        router_of: layer → the module that holds its router's weight.
    """
    routers = compat.router_classes(model)

    def layer(index: int, module: nn.Module) -> Layer:
        parts = list(module.modules())
        experts = next((m for m in parts if compat.computes_experts(m)), None)
        router = next((m for m in parts if routers and isinstance(m, routers)), None)
        return Layer(index, module, experts, router or router_of(index))

    return tuple(layer(i, module) for i, module in enumerate(modules))
