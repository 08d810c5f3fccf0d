"""`moe-compose train-router`, as people type it.

pytest tests/cli/test_train_router.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"

FEW = ("--steps", "4", "--batch-tokens", "128", "--eval-every", "2", "--eval-tokens", "128")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE with a real tokenizer."""
    folder = tmp_path_factory.mktemp("moe") / "[red]moe"
    tiny_checkpoint("qwen3_moe", folder, vocab_size=512, decoder_sparse_step=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    dogs = [f"Dog number {n} ran {n * 7 % 13} miles and slept.\n" for n in range(60)]
    cats = [f"The cat of house {n * 3} likes milk, not {n} mice.\n" for n in range(60)]
    (folder / "dogs.txt").write_text("<|endoftext|>".join(dogs))
    (folder / "cats.txt").write_text("<|endoftext|>".join(cats))
    return folder


def test_end_to_end(command: Any, moe: Path, texts: Path, tmp_path: Path) -> None:
    words = ("train-router", moe, tmp_path / "out", "--data", texts / "dogs.txt", *FEW)
    more = ("--objective", "distill", "--teacher", moe, "--eval-data", texts / "cats.txt")
    ran = command(*words, *more, "--lr", "0.01")
    assert ran.code == 0, ran.err
    for said in (
        "training",
        "held-out text",
        "tensors, unchanged (SHA-256)",
        "tokens/s",
        "entropy",
    ):
        assert said in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80 or "python -c" in ran.out
    assert "step 2: held-out loss" in ran.err and "512 of 512 tokens" in ran.err
    out = tmp_path / "out"
    report = json.loads((out / "training.json").read_text())
    assert report["best"]["loss"] <= report["start"]["loss"] and report["steps"] == 4
    lines = [json.loads(x) for x in (out / "training.jsonl").read_text().splitlines()]
    assert sum("loss" in x for x in lines) == 4 and sum("held_out" in x for x in lines) == 3
    left = tmp_path / "out.training"
    assert not left.exists() or [p.name for p in left.iterdir()] == ["tensorboard"]
    again = command(*words, *more)
    assert again.code == 1 and "--overwrite" in again.err
    over = command(*words, *more, "--overwrite", "--no-validate", "--json")
    assert over.code == 0 and json.loads(over.out)["operation"] == "train-router"


def test_dry_run(command: Any, moe: Path, texts: Path, tmp_path: Path) -> None:
    words = ("train-router", moe, tmp_path / "out", "--dry-run", *FEW)
    by_domain = ("--domain", f"d={texts}/dogs.txt", "--domain", f"c={texts}/cats.txt")
    ran = command(*words, *by_domain, "--train", "router+experts=1")
    assert ran.code == 0 and "Dry run" in ran.err and not (tmp_path / "out").exists()
    found = json.loads(command(*words, *by_domain, "--json").out)
    assert found["trained"] == 3 * 6 * 32 and found["tokens"] == 512 and found["teacher"] == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no text"),
        (b"\x00\x01\x02", "is binary"),
        (b"a", "fitted and held-out"),
    ],
)
def test_bad_text(command: Any, moe: Path, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    ran = command("train-router", moe, tmp_path / "out", "--data", tmp_path / "bad.txt", *FEW)
    assert ran.code == 2 and said in ran.err
    assert not (tmp_path / "out").exists()


def test_bad_json_lines(command: Any, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"content": "x"}\n')
    ran = command("train-router", moe, tmp_path / "out", "--data", tmp_path / "bad.jsonl")
    assert ran.code == 2 and "bad.jsonl:1: neither 'text' nor 'messages'" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is no text"),
        (("--data", "dogs.txt", "--objective", "distill"), "needs a teacher"),
        (("--data", "dogs.txt", "--objective", "domain"), "text by domain"),
        (("--data", "dogs.txt", "--train", "experts"), "router+experts=3,5"),
        (("--data", "dogs.txt", "--eval-data", "dogs.txt"), "flatter"),
        (("--data", "dogs.txt", "--balance", "bias"), "use switch"),
    ],
)
def test_trainings_that_cannot_be_meant(
    command: Any, moe: Path, texts: Path, tmp_path: Path, words: tuple, said: str
) -> None:
    given = [texts / w if w.endswith(".txt") else w for w in words]
    ran = command("train-router", moe, tmp_path / "out", *given)
    assert ran.code == 2 and said in ran.err.replace("\n", " "), ran.err


def test_layer_by_layer(command: Any, moe: Path, texts: Path, tmp_path: Path) -> None:
    words = ("train-router", moe, tmp_path / "out", "--data", texts / "dogs.txt", *FEW)
    words += ("--objective", "layer", "--teacher", moe, "--layer-tokens", "512")
    dry = command(*words, "--dry-run")
    assert dry.code == 0 and "hidden states" in dry.out
    ran = command(*words)
    assert ran.code == 0, ran.err
    assert "error of the layer's output" in ran.out and "left as it was" in ran.out
    assert "1,536 of 1,536 tokens" in ran.err
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["layers"].keys() == {"0", "1", "2"}
    assert len((tmp_path / "out" / "training.jsonl").read_text().splitlines()) == 12


def test_adapters_of_their_own(command: Any, moe: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words = ("train-router", moe, tmp_path / "out", "--data", texts / "dogs.txt", *FEW)
    words += ("--train", "lora-attention", "--adapter-out", tmp_path / "adapters")
    ran = command(*words, "--lora-rank", "2", "--no-validate")
    assert ran.code == 0, ran.err
    assert "needs the adapters in adapters" in ran.out and "PeftModel" in ran.err
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
    again = command(*words, "--overwrite")
    assert again.code == 2 and "new or empty folder" in again.err


def test_a_saved_recipe_trains_the_same(
    command: Any, moe: Path, texts: Path, tmp_path: Path
) -> None:
    """What the command wrote, `run` writes again."""
    out, file, text = tmp_path / "out", tmp_path / "saved.yaml", texts / "dogs.txt"
    words = (*FEW, "--data", text, "--no-validate", "--save-recipe", file)
    ran = command("train-router", moe, out, *words)
    assert ran.code == 0, ran.err
    assert "operation: train-router" in file.read_text()
    before = (out / "model.safetensors").read_bytes()
    assert command("run", file, "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() == before
