"""One expert for every token of a batch, and what a layer's router is given meanwhile.

The model's own routing runs as ever; what it decided is replaced where the layer hands it to its
experts. Shared experts, norms and multipliers around them are not touched.

Shape suffixes: T tokens of a batch, padding included, D what the router is given, E experts,
K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_compose.architectures import Architecture, MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.runtime import Layer, Runner
from moe_compose.surgery.selection import moe_form


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a checkpoint or plan, on disk.

    Attributes:
        form: the family's.
        moe: what the config says of the experts.
        names: sparse layer → the tensor `[E, D]`.
        widths: sparse layer → D.
    """

    form: Architecture
    moe: MoE
    names: Mapping[int, str]
    widths: Mapping[int, int]

    @classmethod
    def of(cls, source: TensorSource) -> Routers:
        """Find them.

        Raises:
            UnsupportedError: no MoE, one whose experts can only be counted, or one whose router has
                rows of no FFN, which no text could belong to.
        """
        form, moe = moe_form(source)
        if moe.zero_experts:
            raise UnsupportedError(
                f"{form.model_type} routes to experts without an FFN ({moe.zero_experts}): text "
                "cannot say what their rows should be"
            )
        template = next(t.name for t in form.router if t.kind == "weight")
        names = {i: template.format(i=i) for i in moe.sparse_layers}
        return cls(form, moe, names, {i: source.tensors[n].shape[-1] for i, n in names.items()})

    def matrices(self, runner: Runner) -> dict[int, nn.Module]:
        """Sparse layer → the module that holds the router's matrix as `weight`.

        Raises:
            UnsupportedError: a class computes it in a way of its own.
        """
        rows = self.moe.num_experts
        found = {i: _matrix(runner.layers[i], rows, width) for i, width in self.widths.items()}
        if absent := [i for i, module in found.items() if module is None]:
            raise UnsupportedError(
                f"{type(runner.model).__name__} computes the routers of layers "
                f"{', '.join(map(str, absent))} in a way of its own: there is no matrix "
                "[experts, width] to give rows to"
            )
        return {i: module for i, module in found.items() if module is not None}

    def check_experts(self, runner: Runner) -> None:
        """Every layer's experts can be forced.

        Raises:
            UnsupportedError: they are not told a token's expert and weight.
        """
        absent = [i for i in self.moe.sparse_layers if runner.layers[i].experts is None]
        if absent or self.moe.routing.applied_to == "input":
            raise UnsupportedError(
                f"an expert of {type(runner.model).__name__} cannot be forced: its layers do not "
                "tell their experts which of them a token is sent to, with which weight"
            )


@contextmanager
def forced(layer: Layer, experts: Sequence[int], moe: MoE) -> Iterator[None]:
    """Send every token of batch i to `experts[i]` alone.

    Its weight is what the k weights sum to: the constant of the scheme if there is one, so that it
    does not depend on the router's rows, and otherwise the sum of those that the router dispatched.
    """

    def force(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = dict(kwargs)
        values = [*args, *named.values()]
        ids, gates = values[1], values[2]
        lead = ids.shape[:-1]
        values[1] = ids.new_full((*lead, 1), experts[layer.index_of_batch])
        if moe.routing.sums_to is not None:
            values[2] = gates.new_full((*lead, 1), moe.routing.sums_to)
        else:
            values[2] = gates.reshape(ids.shape).sum(-1, keepdim=True)
        return tuple(values[: len(args)]), dict(zip(named, values[len(args) :], strict=True))

    assert layer.experts is not None
    handle = layer.experts.register_forward_pre_hook(force, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def router_inputs(
    layer: Layer, matrix: nn.Module, width: int, see: Callable[[Tensor], None]
) -> Iterator[None]:
    """Tell `see` of what the router's matrix is multiplied with, `[T, D]`, once a batch.

    Args:
        layer: the decoder layer.
        matrix: what holds the matrix.
        width: D.
        see: told.
    """
    last = -1

    def given(module: Any, args: tuple[Any, ...], output: Any) -> None:
        nonlocal last
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.shape[-1] != width:
            return
        if last != layer.index_of_batch:
            last = layer.index_of_batch
            see(x.reshape(-1, width))

    handle = matrix.register_forward_hook(given)
    try:
        yield
    finally:
        handle.remove()


def _matrix(layer: Layer, rows: int, width: int) -> nn.Module | None:
    parts = [] if layer.router is None else list(layer.router.modules())
    fits = [m for m in parts if getattr(getattr(m, "weight", None), "shape", None) == (rows, width)]
    return fits[-1] if fits else None
