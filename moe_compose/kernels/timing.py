"""How long something takes on a device.

On a GPU: recorded once as a CUDA graph, so that the host's part is not measured, and replayed
between two events; caches are emptied before each replay. The median is what is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

#: Bytes written before each replay: more than any card's second-level cache.
_FLUSHED = 512 * 2**20


def seconds(
    run: Callable[[], object], device: torch.device, *, repeats: int = 20, graph: bool = True
) -> float:
    """The median time of `run`.

    Args:
        run: what to time; it is run three times before.
        device: where it runs.
        repeats: how many times it is timed.
        graph: record it as a CUDA graph first; what asks the device for values cannot be.
    """
    if device.type != "cuda":
        return statistics.median(_host_seconds(run) for _ in range(repeats))
    with torch.cuda.device(device):
        again = _recorded(run) if graph else _warm(run)
        flush = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            for _ in range(repeats)
        ]
        for start, end in events:
            flush.zero_()
            start.record()
            again()
            end.record()
        torch.cuda.synchronize()
        took: list[float] = [start.elapsed_time(end) for start, end in events]
        return statistics.median(took) / 1000


def _warm(run: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        run()
    return run


def _recorded(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _warm(run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _host_seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun
