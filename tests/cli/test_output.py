"""The module that prints: modes, progress with and without a terminal, and colours.

Run: pytest tests/cli/test_output.py
"""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path

import moe_compose_cli.output as module
import moe_compose_cli.patience as patience
import pytest
from moe_compose_cli.output import LogHandler, Output, visible
from moe_compose_cli.programs import runnable
from moe_compose_cli.screens import grid_of

from moe_compose.checkpoint.writer import Progress
from moe_compose.errors import WriteError


def test_what_is_not_printable_is_escaped() -> None:
    assert visible("a\x1b[0m\x07é→\n\t\udcff") == "a\\x1b[0m\\x07é→\n\t\\udcff"


def test_lines_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ten seconds and at the end; bytes of an earlier write are no speed of this one."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    mib = 1 << 20
    with Output().progress("writing out") as report:
        assert report is not None
        for seconds, done in (
            (0, 100),
            (5, 200),
            (10, 300),
            (12, 350),
            (20, 500),
            (25, 1000),
            (26, 1000),
        ):
            clock[0] = seconds
            report(Progress(done * mib, 1000 * mib, "a"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "writing out: 300.0 MiB of 1000.0 MiB (30%), 20.0 MiB/s, 35 s left",
        "writing out: 500.0 MiB of 1000.0 MiB (50%), 20.0 MiB/s, 25 s left",
        "writing out: 1000.0 MiB of 1000.0 MiB (100%), 36.0 MiB/s",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.configure(quiet=True)
    out.show("a screen")
    out.hint("a hint")
    with out.progress("writing") as report, out.waiting("waiting"):
        assert report is None
    out.result({"a": 1}, "the line")
    assert capsys.readouterr() == ("the line\n", "")


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.configure(as_json=True, quiet=True)
    out.show("a screen")
    out.hint("a hint")
    out.result({"a": float("nan"), "b": "é"}, "the line")
    captured = capsys.readouterr()
    assert captured.out == '{\n  "a": null,\n  "b": "é"\n}\n'
    assert captured.err == "a hint\n"


def test_errors_say_rule_problems_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(WriteError("out/[bold] is full", problems=["a", "b"], hint="Free some."))
    assert capsys.readouterr() == ("", "Error: out/[bold] is full\n  - a\n  - b\n  Free some.\n")


def test_colours_only_where_they_are_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    Output().error(WriteError("no"))
    assert "\x1b[1;31m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    Output().error(WriteError("no"))
    assert "31m" not in capsys.readouterr().err


def test_warnings_of_the_library_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("moe_compose", logging.INFO)
    logger.addHandler(LogHandler())
    logger.warning("%s left out", "[x]")
    assert capsys.readouterr() == ("", "Warning: [x] left out\n")


def test_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Output().progress("writing [bold]out") as report:
        assert report is not None
        report(Progress(512, 1024, "a"))
        report(Progress(1024, 1024, "a"))
    shown = capsys.readouterr().err
    assert "writing [bold]out" in shown
    assert "100%" in shown
    assert "[progress" not in shown


def narrow(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """A terminal, as far as rich can tell."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))


def test_prose_is_broken_at_spaces_and_commands_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 30)
    error = WriteError(
        "there is no room for the result", problems=["a problem that is long enough"]
    )
    error.hint = "moe-compose inspect a/folder/with/a/long/name"
    Output().error(error)
    Output().hint("What to do next is said here:\n  moe-compose inspect a/folder/with/a/long/name")
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err).splitlines()
    assert shown[:3] == [
        "Error: there is no room for",
        "  the result",
        "  - a problem that is long",
    ]
    assert shown[4] == "  moe-compose inspect a/folder/with/a/long/name"
    assert shown[-1].endswith("moe-compose inspect a/folder/with/a/long/name")


def test_screens_in_files_end_their_lines_with_no_spaces(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output().show(grid_of(("a", "b"), [("x", "[bold]"), ("longer", "")]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == "x        [bold]"
    assert all(line == line.rstrip() for line in lines)


def test_of_work_that_never_began_no_bar_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last thing that is done to its line is to clear it."""
    narrow(monkeypatch, 80)
    with pytest.raises(WriteError), Output().counting("measuring", "layers"):
        raise WriteError("no")
    assert capsys.readouterr().err.endswith("\x1b[1A\x1b[2K")


def test_what_is_said_meanwhile_goes_above_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 80)
    out = Output()
    with out.counting("measuring", "layers") as count:
        assert count is not None
        count(1, 4)
        out.warn("odd")
    shown = capsys.readouterr().err
    before = shown[: shown.index("Warning: odd")]
    assert before.endswith("\r\x1b[2K"), "the bar's line is cleared first"


def test_commands_in_hints_run_as_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By name where the shell finds this environment's, else by path."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "moe-compose"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert runnable("Do:\n  moe-compose inspect a") == "Do:\n  moe-compose inspect a"
    monkeypatch.setenv("PATH", "")
    assert runnable("Do:\n  moe-compose inspect a") == "Do:\n  bin/moe-compose inspect a"
    assert runnable("moe-compose is prose here") == "moe-compose is prose here"


def test_a_sign_of_life_goes_with_the_first_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While torch is imported, say; not where nobody looks, and not with `--quiet`."""
    monkeypatch.setattr(patience, "SECONDS", 0.01)
    for quiet, terminal in ((True, True), (False, False), (False, True)):
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        if terminal:
            narrow(monkeypatch, 80)
        out = Output()
        out.configure(quiet=quiet)
        time.sleep(0.2)
        out.error(WriteError("no"))
        shown = capsys.readouterr().err
        assert ("getting ready" in shown) == (terminal and not quiet)
    assert "\x1b[2K" in shown[shown.index("getting ready") : shown.index("Error:")]
