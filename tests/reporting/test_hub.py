"""Pushing to the Hub, dry: a stand-in takes what huggingface_hub would send.

pytest tests/reporting/test_hub.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from moe_compose_cli.main import run

import moe_compose as mc
from moe_compose.errors import OptionError, WriteError
from moe_compose.reporting import hub

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stories260K"


class Recorder:
    """Has HfApi's methods that are used, and holds every call to their signatures."""

    def __init__(self, error: Exception | None = None, *, public: bool = False) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self._error = error
        self._public = public

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(getattr(HfApi, name)).bind(None, *args, **kwargs)
        self.calls[name] = dict(bound.arguments)

    def create_repo(self, *args: Any, **kwargs: Any) -> str:
        self._call("create_repo", args, kwargs)
        if self._error is not None:
            raise self._error
        return "https://hub/org/moe"

    def model_info(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        self._call("model_info", args, kwargs)
        return SimpleNamespace(private=not self._public)

    def upload_folder(self, *args: Any, **kwargs: Any) -> None:
        self._call("upload_folder", args, kwargs)


def stand_in(monkeypatch: pytest.MonkeyPatch, api: Recorder) -> None:
    """A class in the place of HfApi: annotations of other libraries are made of it."""
    made = type("Api", (), {"__new__": lambda cls: api})
    monkeypatch.setattr("huggingface_hub.HfApi", made)


@pytest.fixture(autouse=True)
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")


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


@pytest.mark.parametrize(
    "error", [LocalTokenNotFoundError("no token"), RuntimeError("no route"), OSError("no route")]
)
def test_whatever_fails_nothing_is_lost(moe: mc.Checkpoint, error: Exception) -> None:
    """Errors of the HTTP client are of no kind that huggingface_hub names."""
    with pytest.raises(WriteError, match="could not be pushed to org/moe: no ") as e:
        hub.push(moe, "org/moe", private=True, api=Recorder(error))
    assert f"hf upload org/moe {moe.path} --private" in e.value.hint
    assert moe.path is not None and (moe.path / "model.safetensors").is_file()


def test_what_is_to_be_private_does_not_go_where_all_can_see_it(moe: mc.Checkpoint) -> None:
    api = Recorder(public=True)
    with pytest.raises(WriteError, match="org/moe is there already, and public") as e:
        hub.push(moe, "org/moe", private=True, api=api)
    assert "hf upload" not in e.value.hint
    assert "upload_folder" not in api.calls
    assert hub.push(moe, "org/moe", api=api) == "https://hub/org/moe"


@pytest.mark.parametrize("name", ["not//a repo", "noowner"])
def test_names_are_checked_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="is no name of a repository"):
        hub.check_repo(name)
    code = run(["upcycle", str(MODEL), str(tmp_path / "out"), "--push-to-hub", name])
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_who_cannot_push_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(OptionError, match="nobody is logged in"):
            hub.check_repo("org/moe")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OptionError, match="HF_HUB_OFFLINE is set"):
        hub.check_repo("org/moe")


def test_training_does_not_begin_before_the_name_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train-router", "nowhere", str(tmp_path / "out"), "--data", "nowhere.txt"]
    assert run([*words, "--push-to-hub", "noowner"]) == 2
    assert "noowner" in capsys.readouterr().err
    assert run([*words, "--private"]) == 2
    assert "--private has no meaning" in capsys.readouterr().err


def test_the_command_pushes_what_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Recorder()
    stand_in(monkeypatch, api)
    words = ["upcycle", str(MODEL), str(tmp_path / "out"), "--push-to-hub", "org/moe"]
    assert run([*words, "--dry-run"]) == 0
    assert not api.calls
    assert run([*words, "--no-validate"]) == 0
    assert api.calls["create_repo"]["private"] is False
    assert "https://hub/org/moe" in capsys.readouterr().err


def test_json_tells_of_the_result_even_if_the_push_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, Recorder(OSError("no route")))
    words = ["upcycle", str(MODEL), str(tmp_path / "out"), "--no-validate", "--json"]
    assert run([*words, "--push-to-hub", "org/moe"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["output"], found["pushed"]) == (str(tmp_path / "out"), None)
    assert "hf upload org/moe" in told.err
