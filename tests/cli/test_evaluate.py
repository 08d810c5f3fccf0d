"""`moe-compose evaluate`, as people type it. pytest tests/cli/test_evaluate.py"""

import json
from pathlib import Path

import pytest

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
SMALL = ("--tokens", "120", "--seq-len", "24")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a little dog who liked to run. " * 20)
    return path


def test_evaluate_beside_a_reference(command, text, tmp_path):
    words = ("evaluate", STORIES, "--against", STORIES, "--greedy", "2", *SMALL)
    ran = command(*words, "--domain", f"story={text}", "--domain", f"again={text}")
    assert ran.code == 0, ran.err
    for said in ("story", "again", "all", "100.00%", "the same 2 tokens", "layer"):
        assert said in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    result = tmp_path / "figures.json"
    ran = command(*words, "--data", text, "--json", "--out", result)
    found = json.loads(ran.out)
    assert found["overall"]["kl"] == 0 and found["domains"]["text"]["perplexity"] > 1
    assert json.loads(result.read_text()) == found
    assert not list(tmp_path.glob("*.partial"))


def test_evaluate_alone(command, text):
    ran = command("evaluate", STORIES, "--data", text, *SMALL, "-q")
    assert 0 < float(ran.out) < 10 and not ran.err
    assert "KL" not in command("evaluate", STORIES, "--data", text, *SMALL).out.splitlines()[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--data"),
        (("--data", STORIES / "README.md", "--domain", "a=b"), "both --domain and --data"),
        (("--data", "nothing.txt"), "nothing.txt"),
        (("--domain", "story"), "NAME=FILE"),
        (("--resume", "--data", STORIES / "README.md"), "--resume needs --out"),
        (("--data", STORIES / "model.safetensors"), "model.safetensors"),
        (("--data", STORIES / "README.md", "--tokens", "1"), "tokens (1)"),
        (("--data", STORIES / "README.md", "--dtype", "int8"), "dtype (int8)"),
    ],
)
def test_what_cannot_be_evaluated_is_said(command, words, said):
    ran = command("evaluate", STORIES, *words)
    assert ran.code == 2, ran.err
    assert said.lower() in ran.err.lower()
    assert "Traceback" not in ran.err


def test_figures_are_json_and_called_so(command, text, tmp_path):
    words = ("evaluate", STORIES, "--data", text, *SMALL, "--out", tmp_path / "figures.csv")
    ran = command(*words)
    assert ran.code == 2 and ".json" in ran.err and not list(tmp_path.glob("*.csv*"))


def test_a_file_that_is_there_stays(command, text, tmp_path):
    words = ("evaluate", STORIES, "--data", text, *SMALL, "--out", tmp_path / "figures.json")
    assert command(*words).code == 0
    ran = command(*words)
    assert ran.code == 1 and "--overwrite" in ran.err
    assert command(*words, "--overwrite").code == 0
    assert "is a folder" in command("evaluate", STORIES, "--data", text, "--out", tmp_path).err
