"""What all tests share."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as processors, over all workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from moe_compose.validation import forward


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this file."""
    config.addinivalue_line("markers", "forward: validation runs the forward pass through Triton")


@pytest.fixture(autouse=True)
def _forward_only_where_it_is_meant(request, monkeypatch):
    """A forward pass through Triton starts a process of its own, 10 seconds each: the tests of
    `validation/test_forward.py` and one of the command line have it, the others ask for none.
    """
    if "forward" not in request.keywords:
        monkeypatch.setattr(forward, "SECONDS", 0.0)
