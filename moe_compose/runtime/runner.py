"""`Runner`: run a checkpoint, or a plan that was never written, layer by layer.

    batches ─► lanes: model.forward, unmodified, each in a thread that runs when it is told to
                 │ asks for layer i and parks
    source ─► layer i is filled ─► run for every lane ─► emptied ─► lanes go on to layer i + 1

transformers' own class makes masks, rotary embeddings, caches of linear attention and whatever else
a family needs; nothing of it is rebuilt here. What differs from a loaded model is only when weights
are there.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.architectures import find
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.kernels import hook
from moe_compose.runtime import compat
from moe_compose.runtime.dequantise import dequantised, refuse_lost_scales
from moe_compose.runtime.device import device_of
from moe_compose.runtime.footprint import Footprint
from moe_compose.runtime.layer import Batch, Layer, layers_of
from moe_compose.runtime.loading import Loader, Prefetch
from moe_compose.runtime.lockstep import Call, Lane, stop_all
from moe_compose.runtime.memory import give_back
from moe_compose.runtime.parking import Parking, tensors_in
from moe_compose.runtime.self_test import self_test
from moe_compose.runtime.skeleton import Skeleton

#: Tensors outside of the layers up to this size are read once and stay; larger ones (embedding,
#: head) are read whenever their module runs.
SMALL = 16 << 20

#: What may be done while a layer is real: entered before the first batch, left after the last.
OnLayer = Callable[[Layer], AbstractContextManager[Any] | None]

#: Told of a layer before it is filled, with every batch's index and what the layer is called with.
Ahead = Callable[[int, Iterator[tuple[int, Call]]], None]

#: Takes a batch's index and its logits `[B, S, vocabulary]`, on the device, in the compute dtype.
OnLogits = Callable[[int, Tensor], None]


class Runner:
    """A model that is never whole in memory.

    Args:
        source: a checkpoint or a plan; quantised ones are dequantised layer by layer.
        dtype: what to compute in: `float32`, `bfloat16`, `float16`, `float64`. Tensors that the
            class keeps wider stay so.
        device: where to compute.
        experts: name of an experts implementation: transformers' (`eager`, `grouped_mm`) or that of
            the kernels (`moe_compose_triton`).
        attention: name of an attention implementation; None for the one transformers prefers.
        prefetch: read the next layer while one runs.
        activations: bytes that waiting batches may hold in memory; beyond it they go to temporary
            files.

    Attributes:
        model: the class, on the meta device but for what is filled.
        layers: the decoder layers.
        unused: tensors of the source that the class has no use for (multi-token prediction, ...).

    Raises:
        UnsupportedError: a family or quantisation that cannot be run here.
        CheckpointError: tensors missing or of the wrong shape; nothing was read yet.
        OptionError: an unknown dtype.

    Example:
        >>> runner = Runner(mc.upcycle(dense, options))  # doctest: +SKIP
        >>> runner.run([ids], logits=lambda i, logits: print(logits.shape))  # doctest: +SKIP
        torch.Size([1, 12, 32000])
    """

    def __init__(
        self,
        source: TensorSource,
        *,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        experts: str = "eager",
        attention: str | None = None,
        prefetch: bool = True,
        activations: int = 1 << 30,
    ) -> None:
        if dtype not in FLOAT_DTYPES.values():
            raise OptionError(f"dtype ({dtype}) is none of {', '.join(FLOAT_DTYPES.values())}")
        self.device = device_of(device)
        self_test()
        source = dequantised(source, dtype)
        self._prefetch, self._activations = prefetch, activations
        if experts == hook.NAME:
            hook.register()
        compute: torch.dtype = getattr(torch, dtype)
        self.model = compat.build(source.config, compute, experts=experts, attention=attention)
        self._skeleton = Skeleton(self.model)
        self._loader = Loader(source, self._skeleton, compute)
        refuse_lost_scales(source, self._loader.unused)
        compat.fill_computed_buffers(self.model, self.device)
        self.unused = tuple(self._loader.unused)
        self.layers = layers_of(self.model, self._skeleton.layers, self._router_of(source))
        self._lane: Lane | None = None
        self._busy = threading.Lock()

    def _router_of(self, source: TensorSource) -> Callable[[int], nn.Module | None]:
        form = find(source.config)
        names = [t.name for t in form.router if t.kind == "weight"] if form else []

        def router(layer: int) -> nn.Module | None:
            targets = (self._loader.target_of(name.format(i=layer)) for name in names)
            return next((self._skeleton.home_of(t) for t in targets if t), None)

        return router

    @property
    def footprint(self) -> Footprint:
        """How much memory weights take."""
        return Footprint.of(self._skeleton, self._loader, SMALL, self._prefetch)

    def run(
        self,
        batches: Sequence[Batch | Tensor],
        *,
        on_layer: OnLayer | None = None,
        logits: OnLogits | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """Run batches through the model, all of them through one layer before the next.

        The result does not depend on the order of batches, nor on what is read ahead or filed away.

        Args:
            batches: token ids `[B, S]`, with a mask where they are padded; lengths may differ.
            on_layer: called with each layer when it is real; what it returns is a context around
                the layer's batches. Hooks registered in it see every call of the layer.
            logits: takes each batch's logits once, one batch after another; None: the run ends
                after the last layer, and norm and head are neither read nor run.
            ahead: called with each layer before it is read, which is then not done ahead of time.

        Raises:
            OptionError: no batches, or the runner is running already.
            CheckpointError: a weight could not be read.
        """
        given = [Batch.of(b) for b in batches]
        if not given:
            raise OptionError("there is nothing to run (0 batches)")
        if not self._busy.acquire(blocking=False):
            raise OptionError("this runner is running already; make one for each run")
        try:
            with ExitStack() as stack, torch.no_grad():
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-compose-"))
                parking = Parking(self._activations, Path(folder))
                prefetch = stack.enter_context(Prefetch(self._loader))
                stack.enter_context(self._gates())
                lanes = [Lane(i, partial(self._forward, b)) for i, b in enumerate(given)]
                stack.callback(stop_all, lanes)
                self._all_layers(given, lanes, parking, prefetch, on_layer, logits, ahead)
        finally:
            self._empty_all()
            self._busy.release()

    def _all_layers(
        self,
        batches: list[Batch],
        lanes: list[Lane],
        parking: Parking,
        prefetch: Prefetch,
        on_layer: OnLayer | None,
        logits: OnLogits | None,
        ahead: Ahead | None,
    ) -> None:
        last = len(self.layers) - 1
        self._fill_first()
        for lane in lanes:
            self._advance(lane, parking, logits)
        self._empty_large()
        while waiting := [lane for lane in lanes if lane.call is not None]:
            at = min(lane.call.layer for lane in waiting if lane.call is not None)
            here = [lane for lane in waiting if lane.call is not None and lane.call.layer == at]
            layer, names = self.layers[at], self._skeleton.of_layer[at]
            if ahead is not None:
                ahead(at, parking.waiting(here))
            self._fill(prefetch.take(at, names))
            if self._prefetch and ahead is None and at < last:
                prefetch.start(at + 1, self._skeleton.of_layer[at + 1])
            with (on_layer and on_layer(layer)) or nullcontext():
                for lane in here:
                    layer.batch = batches[lane.index]
                    layer.index_of_batch = lane.index
                    self._run_layer(layer, lane, parking)
            layer.batch = None
            self._skeleton.empty(names)
            give_back(self.device)
            if at == last and logits is None:
                return
            for lane in here:
                self._advance(lane, parking, logits)
            self._empty_large()

    def _run_layer(self, layer: Layer, lane: Lane, parking: Parking) -> None:
        """Call a layer for one batch, as the batch's forward asked for it, hooks included."""
        call = lane.call
        assert call is not None
        parking.take(lane.index)
        gate = layer.module.__dict__.pop("forward")
        try:
            lane.output = layer.module(*call.args, **call.kwargs)
        finally:
            layer.module.__dict__["forward"] = gate
        parking.put(lane.index, (call.args, call.kwargs, lane.output))

    def _advance(self, lane: Lane, parking: Parking, logits: OnLogits | None) -> None:
        """Let a batch go on to its next layer, or to its end."""
        parking.take(lane.index)
        self._lane = lane
        lane.advance()
        if lane.call is not None:
            parking.put(lane.index, (lane.call.args, lane.call.kwargs))
            return
        parking.drop(lane.index)
        lane.join()
        result, lane.result = lane.result, None
        if logits is not None:
            logits(lane.index, result)

    def _forward(self, batch: Batch) -> Tensor:
        """Inside a lane: the model's forward, unmodified."""
        mask = None if batch.mask is None else batch.mask.to(self.device)
        ids = batch.ids.to(self.device)
        found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found

    def _gate(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Inside a lane, in place of a layer's forward: ask the caller to run it."""
        assert self._lane is not None
        return self._lane.park(Call(layer, args, kwargs))

    @contextmanager
    def _gates(self) -> Iterator[None]:
        """Every layer asks the caller; every module outside is filled right before it runs."""
        handles = []
        for module, names in self._skeleton.outside.items():
            fill = partial(self._fill_outside, names)
            handles.append(module.register_forward_pre_hook(fill))
        for i, module in enumerate(self._skeleton.layers):
            module.__dict__["forward"] = partial(self._gate, i)
        try:
            yield
        finally:
            for module in self._skeleton.layers:
                module.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        self._skeleton.put({name: t.to(self.device) for name, t in tensors.items()})

    def _fill_first(self) -> None:
        """Before any forward begins, all but the head: some ask a weight for its device before they
        call its module.
        """
        head = self.model.get_output_embeddings()
        for module, names in self._skeleton.outside.items():
            if module is not head:
                self._fill_outside(names, module, ())

    def _fill_outside(self, names: list[str], module: nn.Module, args: tuple[Any, ...]) -> None:
        if any(t.is_meta for t in tensors_in(args)):
            raise UnsupportedError(
                f"{type(self.model).__name__} looks at the weights of {type(module).__name__} "
                "before it calls it; they are not there yet"
            )
        absent = [name for name in names if self._skeleton.is_empty(name)]
        if absent:
            self._fill(self._loader.load(absent))

    def _outside(self) -> list[str]:
        return [name for names in self._skeleton.outside.values() for name in names]

    def _empty_large(self) -> None:
        self._skeleton.empty(n for n in self._outside() if self._loader.sizes[n] > SMALL)

    def _empty_all(self) -> None:
        self._lane = None
        self._skeleton.empty(self._outside())
        for names in self._skeleton.of_layer:
            self._skeleton.empty(names)
        give_back(self.device)
