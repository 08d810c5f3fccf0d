"""A lane: one batch's `model.forward`, in a thread of its own that runs only when it is told to.

The caller and its lanes alternate strictly, like coroutines: `advance` lets a lane run until it
asks for a decoder layer (`park`) or ends, and only then returns. The layer itself is run by the
caller, and its output is what `park` returns inside the lane. So one thread does the heavy work,
whatever the number of batches, and the model's own forward stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class _Stopped(BaseException):
    """Unwinds a lane; no `except Exception` of a model may catch it."""


@dataclass(slots=True)
class Call:
    """A decoder layer that a lane waits for: which one, and what it is called with."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Lane:
    """One batch on its way through the model.

    Args:
        index: of the batch.
        work: the model's forward on this batch; what it returns becomes `result`.

    Attributes:
        call: the layer it waits for; None while it runs and when it has ended.
        result: what `work` returned.
        done: whether it has ended.
    """

    def __init__(self, index: int, work: Callable[[], Any]) -> None:
        self.index = index
        self.call: Call | None = None
        self.output: Any = None
        self.result: Any = None
        self.done = False
        self._work = work
        self._error: BaseException | None = None
        self._stopping = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name=f"moe-compose lane {index}")

    def advance(self) -> None:
        """Let the lane run on, with `output` as what its layer gave, until it parks or ends.

        Raises:
            BaseException: whatever its forward raised.
        """
        self.call = None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def park(self, call: Call) -> Any:
        """Inside the lane: wait until the caller has run a layer; returns the layer's output."""
        self.call = call
        del call
        self._back.release()
        self._go.acquire()
        if self._stopping:
            raise _Stopped
        output, self.output = self.output, None
        return output

    def stop(self) -> None:
        """End the lane wherever it stands. It runs to its next layer at most; `join` waits."""
        self._stopping = True
        self._go.release()

    def join(self) -> None:
        """Wait until the thread has ended; after `stop`, or when `done`."""
        if self._thread.ident is not None:
            self._thread.join()
        self.call = self.output = self._error = None

    def _main(self) -> None:
        try:
            with torch.no_grad():
                self.result = self._work()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            self._back.release()


def stop_all(lanes: list[Lane]) -> None:
    """Stop every lane and wait for the threads: none outlives this call.

    All are told before one is waited for, so that an interrupt meanwhile leaves no thread waiting
    for ever.
    """
    for lane in lanes:
        lane.stop()
    for lane in lanes:
        lane.join()
