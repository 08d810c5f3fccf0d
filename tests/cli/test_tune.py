"""`moe-compose tune` where there is no GPU; the search itself is in tests/kernels/test_tune.py.

Run: pytest tests/cli/test_tune.py
"""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_no_gpu_is_an_error_that_says_what_is_needed(command) -> None:
    ran = command("tune", "--json")
    assert ran.code == 1 and "tuning needs a GPU" in ran.err
    assert json.loads(ran.out)["error"]["exit_code"] == 1
    assert "TRITON_INTERPRET=1" in command("tune", "--device", "cpu").err


@pytest.mark.parametrize(
    "words",
    [
        ("--shape", "1,2,3"),
        ("--shape", "a,b,c,d"),
        ("--tokens", "0"),
        ("--output", "/nowhere/at/all.json"),
        ("--repeat", "0"),
    ],
)
def test_wrong_usage(command, words: tuple[str, ...]) -> None:
    assert command("tune", *words).code == 2
