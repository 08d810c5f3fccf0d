"""A sign of life before a command has anything to show: to import torch takes seconds on a busy
machine. Nothing is printed here: rich draws on the console that it is given.
"""

from __future__ import annotations

from threading import Lock, Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: Seconds without a word that need no explanation.
SECONDS = 1.0


class Patience:
    """A spinner that comes after a second, and goes with the first word.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._lock, self._ended = Lock(), False
        self._status = console.status("getting ready")
        self._timer = Timer(SECONDS, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if not self._ended:
                self._status.start()

    def end(self) -> None:
        """Something else is shown now."""
        with self._lock:
            self._ended = True
            self._timer.cancel()
            self._status.stop()
