"""The original with some of its experts masked out of its routers: what a pruned checkpoint must
compute exactly.

Whatever the scheme, an expert is out of reach when its logit is −inf: a softmax over all experts is
then one over the others, a sigmoid is 0. So the product with the router's matrix, wherever the
class computes it, gets −inf in the columns of removed experts. Where a correction bias is added
before the choice, its entries become −inf too, since 0 plus a bias could still win; and a table of
expert ids is rewritten by the rule that pruning follows.

Everything else is the source's: its tensors, its classes, its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from moe_compose.architectures.base import RouterTensor
from moe_compose.checkpoint.source import Extent, TensorInfo, TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.selection import moe_form
from moe_compose.surgery.tables import Renumber
from moe_compose.surgery.transforms import Read

if TYPE_CHECKING:
    import torch

    from moe_compose.runtime import Layer, OnLayer

Kept = Mapping[int, Sequence[int]]


class Masked:
    """A `TensorSource`: another one, whose correction biases and tables leave experts out.

    Args:
        source: an MoE.
        kept: sparse layer → experts that can still be chosen.
    """

    def __init__(self, source: TensorSource, kept: Kept) -> None:
        self._source = source
        form, self._moe = moe_form(source)
        self._changed: dict[str, tuple[RouterTensor, Sequence[int]]] = {}
        for layer, ids in kept.items():
            for line in form.router:
                name = line.name.format(i=layer)
                if line.kind in ("correction_bias", "table") and name in source.tensors:
                    self._changed[name] = line, ids
        self.config, self.tensors = source.config, source.tensors
        self.files = source.files
        self.weight_files, self.label = source.weight_files, source.label

    def digest(self) -> str:
        return self._source.digest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return None if name in self._changed else self._source.extents(name)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        if name in self._changed:
            yield self.read(name).reshape(-1)
        else:
            yield from self._source.stream(name)

    def read(self, name: str) -> torch.Tensor:
        import torch

        found = self._source.read(name)
        if name not in self._changed:
            return found
        line, ids = self._changed[name]
        info: TensorInfo = self.tensors[name]
        if line.kind == "table":
            kept = tuple(sorted(ids))
            rewrite = Renumber(Read("source", info), kept, self._moe.num_experts, keep_ids=True)
            return rewrite.apply(found)
        gone = sorted(set(range(self._moe.num_experts)) - set(ids))
        at = torch.tensor(gone, dtype=torch.int64)
        return found.clone().index_fill_(line.dim, at, -torch.inf)


def masking(source: TensorSource, kept: Kept) -> OnLayer:
    """What a `Runner` of `Masked(source, kept)` is to do in each layer.

    Raises:
        UnsupportedError: while it runs, if a router's product is computed in a way of its own.
    """
    _, moe = moe_form(source)
    rows = moe.num_experts + moe.zero_experts

    @contextmanager
    def masked(layer: Layer, gone: Sequence[int]) -> Iterator[None]:
        mode = _mode()(matrix_of(layer, rows), gone)
        calls = 0

        def enter(*_: Any) -> None:
            mode.__enter__()

        def leave(*_: Any) -> None:
            nonlocal calls
            calls += 1
            mode.__exit__(None, None, None)

        handles = [
            layer.module.register_forward_pre_hook(enter),
            layer.module.register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if mode.masked < calls:
            name = type(layer.module).__name__
            raise UnsupportedError(f"{name} computes its router in a way that cannot be masked")

    def on_layer(layer: Layer) -> AbstractContextManager[None] | None:
        gone = sorted(set(range(moe.num_experts)) - set(kept.get(layer.index, range(rows))))
        # A layer without a router chooses by its table.
        return masked(layer, gone) if gone and layer.router is not None else None

    return on_layer


def matrix_of(layer: Layer, rows: int) -> torch.Tensor:
    """The matrix whose product with a token is the layer's router logits.

    Raises:
        UnsupportedError: there is none with so many rows.
    """
    from torch import nn

    assert layer.router is not None
    inner = [m for m in layer.router.modules() if isinstance(m, nn.Linear)]
    for module in (*reversed(inner), layer.router):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and weight.shape[0] == rows:
            found: torch.Tensor = weight
            return found
    name = type(layer.router).__name__
    raise UnsupportedError(f"layer {layer.index}: {name} has no matrix of {rows} rows")


def _mode() -> Callable[..., Any]:
    """A mode of torch under which products with a matrix, or with the same in another dtype, have
    −inf in some columns.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    casts = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float, torch.Tensor.double)

    class Masking(TorchFunctionMode):
        def __init__(self, matrix: torch.Tensor, gone: Sequence[int]) -> None:
            super().__init__()
            self._same = [matrix]
            self._gone = torch.tensor(list(gone), device=matrix.device)
            self.masked = 0

        def _is_it(self, value: Any) -> bool:
            return any(value is known for known in self._same)

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            if func in casts and self._is_it(args[0]) and not self._is_it(out):
                self._same.append(out)
            is_product = func is torch.nn.functional.linear
            if is_product and self._is_it(args[1] if len(args) > 1 else kwargs["weight"]):
                self.masked += 1
                return out.index_fill(-1, self._gone, -torch.inf)
            return out

    return Masking
