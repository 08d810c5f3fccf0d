"""The FFN of each layer of a streamed model, what it is given, and what it should return.

Shape suffixes: T tokens, N those of a batch, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.architectures import find
from moe_compose.architectures.parts import layout_of
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.kernels import hook
from moe_compose.runtime import Layer, Runner
from moe_compose.runtime.lockstep import Call
from moe_compose.runtime.whole import Whole
from moe_compose.training.engine import Engine
from moe_compose.training.one_layer import Tokens, wide
from moe_compose.training.options import TrainOptions
from moe_compose.training.setup import dtype_of

#: A layer's output may differ by so much of its FFN's from the sum with what goes around it.
_ROUNDED = 0.1


class Streamed:
    """A model of which one layer is in memory.

    Attributes:
        runner: what runs it.
        whole: its tensors, those that are there.
    """

    def __init__(self, source: TensorSource, options: TrainOptions, engine: Engine) -> None:
        dtype = dtype_of(source, options, engine.device.type)
        self.runner = Runner(
            source, dtype=dtype, device=engine.device, experts=hook.NAME, prefetch=False
        )
        self.whole = Whole.streamed(source, self.runner)
        self._label = source.label
        form = find(source.config)
        assert form is not None
        self._form = layout_of(form, source.tensors)
        sparse = form.is_moe and form.moe(source.config).sparse_layers
        self._sparse = sparse or ()

    def ffn(self, layer: int) -> nn.Module:
        """The module around a layer's router and experts, or around its dense FFN.

        Raises:
            UnsupportedError: there is none but the decoder layer.
        """
        form = self._form
        lies = form.experts if layer in self._sparse else form.mlp
        names = list(lies.names) if lies is not None else []
        if layer in self._sparse:
            names += [t.name for t in form.router if t.kind == "weight"]
        targets = (self.whole.target_of(n.format(i=layer, e=0)) for n in names)
        paths = [t.split(".")[:-1] for t in targets if t is not None]
        common = paths[0] if paths else []
        for path in paths[1:]:
            same = (a == b for a, b in zip(common, path, strict=False))
            common = common[: next((i for i, equal in enumerate(same) if not equal), len(path))]
        found: nn.Module = self.whole.model.get_submodule(".".join(common))
        decoder = self.runner.layers[layer].module
        if found is decoder or not any(found is m for m in decoder.modules()):
            raise UnsupportedError(
                f"{self._label}, layer {layer}: no module of {type(decoder).__name__} is the FFN "
                "alone, so its router cannot be trained layer by layer",
                hint="Use the objective distill.",
            )
        return found


class Passage:
    """A text's passage through a layer of the result, beside the original's.

    With h the hidden state behind the original's layer, h′ that behind ours, and f what our FFN
    returned, `y = h − (h′ − f)` is what would make both the same. That is for layers that add f to
    what goes around it; where a layer does more with it (a norm, a multiplier), y is what the
    original's FFN returned. Tokens count by 1/‖h‖², since norms follow.

    Args:
        layer: ours.
        ffn: its FFN.
        tokens: how many there will be, padding not counted.

    Attributes:
        ffn: as given.
    """

    def __init__(self, layer: Layer, ffn: nn.Module, tokens: int) -> None:
        self.ffn, self._layer, self._tokens = ffn, layer, tokens
        self._kept: list[Tensor] | None = None
        self._plain: bool | None = None
        self._theirs = self._x = self._f = torch.empty(0)
        self._at = 0

    def remember(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """What the original's FFN returns, as its hook."""
        self._theirs = _only(output)

    def see(self, call: Call, h: Tensor, real_T: Tensor) -> None:
        """Run a batch through our layer.

        Args:
            call: what the layer is called with.
            h: hidden state behind the original's, `[B, S, D]`.
            real_T: tokens that are no padding.

        Raises:
            UnsupportedError: an FFN that is given more than hidden states.
        """
        with hooked(self.ffn, self._see):
            ours = first(self._layer.module, call.args, call.kwargs)
        f = self._f.reshape(h.shape)
        around = wide(ours) - wide(f)
        if self._plain is None:
            with hooked(self.ffn, _nothing):
                without = first(self._layer.module, call.args, call.kwargs)
            apart = (wide(without) - around).norm()
            self._plain = bool(apart <= _ROUNDED * wide(f).norm())
        y = wide(h) - around if self._plain else self._theirs.reshape(h.shape)
        w = 1 / h.double().square().sum(-1, keepdim=True).clamp(min=1e-30)
        self._keep([part.flatten(0, -2)[real_T] for part in (self._x, y.to(f.dtype), w)])

    def tokens(self, held_T: Tensor) -> Tokens:
        """All of it.

        Args:
            held_T: tokens that are not trained on.
        """
        assert self._kept is not None
        x_TD, y_TD, w_T1 = self._kept
        return Tokens(x_TD, y_TD, (w_T1 / w_T1.mean())[:, 0], held_T)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if x is not None]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise UnsupportedError(
                f"layer {self._layer.index}: {type(module).__name__} is given more than hidden "
                "states, so its router cannot be trained layer by layer",
                hint="Use the objective distill.",
            )
        self._x, self._f = given[0], _only(output)

    def _keep(self, parts: list[Tensor]) -> None:
        """After those of earlier batches, in tensors that are made once."""
        if self._kept is None:
            self._kept = [p.new_empty(self._tokens, p.shape[-1]) for p in parts]
        for kept, part in zip(self._kept, parts, strict=True):
            kept[self._at : self._at + len(part)] = part
        self._at += len(parts[0])


def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A decoder layer's hidden states."""
    return _only(module(*args, **kwargs))


@contextmanager
def hooked(module: nn.Module, see: Callable[..., Any]) -> Iterator[None]:
    """Tell `see` of every call of a module: itself, arguments, keywords, output."""
    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _only(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _nothing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    zeros = torch.zeros_like(_only(output))
    return (zeros, *output[1:]) if isinstance(output, tuple) else zeros
