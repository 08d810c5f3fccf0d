"""Two models run at the same time, layer beside layer, so that what they compute can be compared
while it is there: neither hidden states nor logits of all the text are ever kept.

Each runs in a thread of its own and brings what it has to a meeting: a batch's output of a layer,
or its logits. The meeting is over when both were compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from moe_compose.runtime import Batch, Layer, OnLayer, Runner

#: Compares what both bring: batch, layer (None for logits), the reference's, the model's.
Compare = Callable[[int, int | None, Tensor, Tensor], None]


class _Meeting:
    """Where two threads bring what belongs together."""

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._brought: list[tuple[Any, Tensor] | None] = [None, None]
        self._barrier = threading.Barrier(2, action=self._both)

    def bring(self, side: int, what: tuple[int, int | None], tensor: Tensor) -> None:
        """Wait for the other side, until both tensors were compared."""
        self._brought[side] = what, tensor
        self._barrier.wait()

    def leave(self) -> None:
        """Bring nothing any more; who waits is told by an exception."""
        self._barrier.abort()

    def _both(self) -> None:
        first, second = self._brought
        assert first is not None and second is not None and first[0] == second[0]
        batch, layer = first[0]
        self._compare(batch, layer, first[1], second[1])
        self._brought = [None, None]


def run_beside(
    reference: Runner,
    model: Runner,
    batches: Sequence[Batch],
    compare: Compare,
    *,
    layers: bool,
    logits: bool = True,
    on_layer: tuple[OnLayer | None, OnLayer | None] = (None, None),
) -> None:
    """Run both over the same batches.

    Args:
        reference: the one the other is held to.
        model: the other.
        batches: token ids.
        compare: called for every batch of every layer and for every batch's logits, from either
            thread, but never at the same time.
        layers: whether layers' outputs are compared; both must have as many.
        logits: whether logits are; otherwise the runs end after the last layer.
        on_layer: what else is done while a layer of the reference, or of the model, is there.

    Raises:
        BaseException: what either run raised.
    """
    meeting = _Meeting(compare)
    errors: list[BaseException] = []

    def run(side: int, runner: Runner) -> None:
        more = on_layer[side]

        def take(index: int, found: Tensor) -> None:
            meeting.bring(side, (index, None), found)

        @contextmanager
        def watch(layer: Layer) -> Iterator[None]:
            bring = (lambda i, x: meeting.bring(side, (i, layer.index), x)) if layers else None
            with (more and more(layer)) or nullcontext(), _outputs(layer, bring):
                yield

        try:
            runner.run(batches, on_layer=watch, logits=take if logits else None)
        except threading.BrokenBarrierError:
            pass  # the other side failed, and says why
        except BaseException as e:
            errors.append(e)
            meeting.leave()

    thread = threading.Thread(target=run, args=(0, reference), name="moe-compose reference")
    thread.start()
    try:
        run(1, model)
    finally:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def _outputs(layer: Layer, take: Callable[[int, Tensor], None] | None) -> Iterator[None]:
    """Give every batch's output of a layer to `take`, if there is one."""
    if take is None:
        yield
        return

    def hook(module: Any, args: Any, output: Any) -> None:
        take(layer.index_of_batch, output[0] if isinstance(output, tuple) else output)

    handle = layer.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
