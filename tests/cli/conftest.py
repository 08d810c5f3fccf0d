"""Running commands in this process, on a tiny real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
from hand_made import Make, make_checkpoint
from moe_compose_cli.main import run

from moe_compose.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Ran:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A function that runs a command line, on a terminal of 80 columns that is none."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def command(*words: str | Path) -> Ran:
        capfd.readouterr()
        code = run([str(word) for word in words])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes a checkpoint of zeros into a folder of this name."""

    def make(kind: str = "llama", name: str = "dense", **rest: object) -> Checkpoint:
        return make_checkpoint(tmp_path / name, kind, **rest)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, saved by transformers, in a folder named like markup."""
    folder = tmp_path_factory.mktemp("models") / "[bold]tiny"
    tiny_models.tiny_checkpoint("llama", folder)
    return folder
