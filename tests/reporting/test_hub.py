"""Pushing to the Hub, dry: a stand-in takes what huggingface_hub would send.

pytest tests/reporting/test_hub.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from moe_compose_cli.main import run

import moe_compose as mc
from moe_compose.errors import OptionError, WriteError
from moe_compose.reporting import hub

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stories260K"


class Recorder:
    """Has HfApi's two methods, and holds every call to their signatures."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self._error = error

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(getattr(HfApi, name)).bind(None, *args, **kwargs)
        self.calls[name] = dict(bound.arguments)

    def create_repo(self, *args: Any, **kwargs: Any) -> str:
        self._call("create_repo", args, kwargs)
        if self._error is not None:
            raise self._error
        return "https://hub/org/moe"

    def upload_folder(self, *args: Any, **kwargs: Any) -> None:
        self._call("upload_folder", args, kwargs)


@pytest.fixture
def moe(tmp_path: Path) -> mc.Checkpoint:
    plan = mc.upcycle(mc.Checkpoint.open(MODEL), mc.UpcycleOptions(num_experts=2))
    return mc.write(plan, tmp_path / "moe")


def test_the_folder_goes_with_its_card(moe: mc.Checkpoint) -> None:
    api = Recorder()
    assert hub.push(moe, "org/moe", private=True, api=api) == "https://hub/org/moe"
    assert api.calls["create_repo"]["private"] is True
    sent = api.calls["upload_folder"]
    assert sent["folder_path"] == str(moe.path)
    assert sent["commit_message"] == "moe-compose upcycle"
    assert (Path(sent["folder_path"]) / "README.md").is_file()


def test_who_is_not_logged_in_loses_nothing(moe: mc.Checkpoint) -> None:
    with pytest.raises(WriteError, match="could not be pushed to org/moe: no token") as e:
        hub.push(moe, "org/moe", api=Recorder(LocalTokenNotFoundError("no token")))
    assert "hf auth login" in e.value.hint
    assert (moe.path / "model.safetensors").is_file()


def test_names_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no name of a repository"):
        hub.check_repo("not//a repo")
    code = run(["upcycle", str(MODEL), str(tmp_path / "out"), "--push-to-hub", "a//b"])
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_the_command_pushes_what_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Recorder()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    words = ["upcycle", str(MODEL), str(tmp_path / "out"), "--push-to-hub", "org/moe"]
    assert run([*words, "--dry-run"]) == 0
    assert not api.calls
    assert run([*words, "--no-validate"]) == 0
    assert api.calls["create_repo"]["private"] is False
    assert "https://hub/org/moe" in capsys.readouterr().err
