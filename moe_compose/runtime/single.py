"""One decoder layer of a model by itself, to be called by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_compose.runtime.layer import Layer
from moe_compose.runtime.memory import give_back
from moe_compose.runtime.runner import Runner


@contextmanager
def filled(runner: Runner, index: int) -> Iterator[Layer]:
    """A layer that is real in this context. Its model must not be running meanwhile.

    Args:
        runner: of the model.
        index: of the layer.
    """
    names = runner._skeleton.of_layer[index]
    runner._fill(runner._loader.load(names))
    try:
        yield runner.layers[index]
    finally:
        runner._skeleton.empty(names)
        give_back(runner.device)
