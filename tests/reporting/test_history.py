"""`moe_compose.json`, which anybody may have written.

Run: pytest tests/reporting/test_history.py
"""

from __future__ import annotations

import pytest
from hand_made import Make

import moe_compose as mc
from moe_compose.surgery import history
from moe_compose.surgery.history import HISTORY_NAME, read_history


def test_records_are_read(make: Make) -> None:
    assert read_history(make()) == []
    source = make(name="b", files={HISTORY_NAME: '[{"operation": "merge"}]'})
    assert read_history(source) == [{"operation": "merge"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "must be a list of records"),
        ("[1]", "must be a list of records"),
        ("[", "cannot read dense/moe_compose.json"),
        ("[" * 200_000, "cannot read dense/moe_compose.json"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "cannot read"),
    ],
    ids=["object", "numbers", "cut short", "deep", "no JSON"],
)
def test_what_is_no_history_is_refused(make: Make, text: str, said: str) -> None:
    with pytest.raises(mc.CheckpointError, match=said) as caught:
        read_history(make(files={HISTORY_NAME: text}))
    assert caught.value.hint == "Repair or remove the file."


def test_a_file_too_large_is_not_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_BYTES", 10)
    with pytest.raises(mc.CheckpointError, match="larger than 10 bytes"):
        read_history(make(files={HISTORY_NAME: "[" + " " * 20 + "]"}))
