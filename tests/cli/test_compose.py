"""`moe-compose compose`, `anchor`, `add-expert`, `swap-expert`, `remove-expert`, `expand` and
`pack-expert`: the modes, the exit codes, and what is refused.

Run: pytest tests/cli/test_compose.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import dense_checkpoint
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs
from mutants import Tensors, mutant
from safetensors.torch import save_file
from typer.main import get_command

import moe_compose as mc

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
OPTIONS = {
    "compose": mc.ComposeOptions,
    "anchor": mc.AnchorOptions,
    "add-expert": mc.AddOptions,
    "swap-expert": mc.SwapOptions,
    "remove-expert": mc.RemoveOptions,
    "expand": mc.ExpandOptions,
}
TEXT = {
    "base": "Once upon a time there was a little dog. He ran to the park and was happy. ",
    "law": "The sun is hot. She said: do not go up the big tree, it is not for you! ",
    "code": "if x = 1 then y = 2 and 3 + 4 is 7, or not; end. for i in a, b, c do it. ",
}
FAST = ("--text-tokens", "600", "--no-validate")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a base and two models trained from it, with a tokenizer, and text of each."""
    folder = tmp_path_factory.mktemp("models")
    dense_checkpoint("llama", folder / "base", vocab_size=512)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / file, folder / "base" / file)
    for seed, name in enumerate(("law", "[bold]code"), 1):
        generator = torch.Generator().manual_seed(seed)

        def train(tensors: Tensors, generator: torch.Generator = generator) -> None:
            for key, t in sorted(tensors.items()):
                tensors[key] = t + 0.1 * torch.randn(t.shape, generator=generator) * t.std()

        mutant(mc.Checkpoint.open(folder / "base"), folder / name, train)
    for name, text in TEXT.items():
        (folder / f"{name}.txt").write_text("<|endoftext|>".join([text * 2] * 30))
    return folder


@pytest.fixture(scope="module")
def three(models: Path) -> tuple[str, ...]:
    """What says that base, law and code are composed."""
    law, code = (f"{n}={models / f}" for n, f in (("law", "law"), ("code", "[bold]code")))
    return ("--base", str(models / "base"), "--expert", law, "--expert", code)


@pytest.fixture(scope="module")
def moe(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three under a router that was drawn."""
    donors = {
        n: mc.Checkpoint.open(models / f) for n, f in (("law", "law"), ("code", "[bold]code"))
    }
    plan = mc.compose(mc.Checkpoint.open(models / "base"), donors)
    written = mc.write(plan, tmp_path_factory.mktemp("moe") / "[bold]moe")
    assert written.path is not None
    return written.path


def texts(models: Path, *names: str) -> tuple[str, ...]:
    return tuple(w for n in names for w in ("--data", f"{n}={models / n}.txt"))


@pytest.mark.parametrize("verb", OPTIONS)
def test_every_field_is_a_flag(verb: str) -> None:
    group: Any = get_command(app)
    flags = {p.name: p for p in group.commands[verb].params}
    for name, text in attribute_docs(OPTIONS[verb]).items():
        assert flags[name].opts == [f"--{name.replace('_', '-')}"]
        assert flags[name].help == text


# compose


def test_for_people(command: Any, three: tuple[str, ...], tmp_path: Path) -> None:
    ran = command("compose", tmp_path / "out", *three)
    assert ran.code == 0, ran.err
    for text in ("base: llama, dense", "[bold]code: llama, dense", "mixtral", "3 experts",
                 "not trained (random rows)", "✓ valid"):  # fmt: skip
        assert text in ran.out, text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["expert_names"] == ["base", "law", "code"]


def test_for_programs_and_for_scripts(command: Any, three: tuple[str, ...], tmp_path: Path) -> None:
    words = ("compose", tmp_path / "out", *three, "--seed", "3", "--shared", "base")
    dry = command(*words, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not (tmp_path / "out").exists()
    document = json.loads(dry.out)
    assert document["decided"] == {"experts": ["base", "law", "code"]}
    assert (document["options"]["router"], document["options"]["seed"]) == ("random", 3)
    quiet = command(*words, "--no-validate", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, f"{tmp_path / 'out'}\n", "")
    again = json.loads(command(*words, "--no-validate", "--json", "--overwrite").out)
    assert again["plan_digest"] == document["plan_digest"]


def test_router_rows_from_text(
    command: Any, models: Path, three: tuple[str, ...], tmp_path: Path
) -> None:
    words = ("compose", tmp_path / "out", *three, *texts(models, "base", "law", "code"), *FAST)
    dry = command(*words, "--dry-run")
    assert dry.code == 0, dry.err
    assert "nothing is measured on text" in dry.err
    ran = command(*words)
    assert ran.code == 0, ran.err
    assert "router rows by ridge" in ran.out
    assert "measuring router inputs" in ran.err
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "routing_search.json" in names


def test_rows_from_embeddings(
    command: Any, models: Path, three: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "e.safetensors"
    save_file({n: torch.randn(2, 32) for n in ("base", "law", "code")}, file)
    words = ("compose", tmp_path / "out", *three, "--router", "domain", "--no-validate")
    assert command(*words, "--embeddings", file).code == 0
    file.write_text("no tensors")
    ran = command(*words, "--embeddings", file, "--overwrite")
    assert ran.code == 2
    assert "is no safetensors file" in ran.err


def test_a_config_of_mergekit(command: Any, models: Path, tmp_path: Path) -> None:
    """Flags win over it; the base is no expert."""
    prompts = [[TEXT["law"]], [TEXT["code"]]]
    experts = [
        {"source_model": str(models / name), "positive_prompts": p}
        for name, p in zip(("law", "base"), prompts, strict=True)
    ]
    file = tmp_path / "[bold]moe.yml"
    file.write_text(json.dumps({"base_model": str(models / "base"), "experts": experts}))
    words = ("compose", tmp_path / "out", "--from-mergekit", file, "--no-validate", "--json")
    ran = command(*words)
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["expert_names"] == ["law", "base-2"]
    assert "router rows by hidden" in ran.out
    ran = command(*words, "--router", "random", "--top-k", "1", "--overwrite")
    assert ran.code == 0, ran.err
    options = json.loads(ran.out)["options"]
    assert (options["router"], options["top_k"], options["shared"]) == ("random", 1, "base")
    file.write_text('{"base_model": "a", "expert": [], "gate_mode": "cheap_embed"}')
    ran = command(*words, "--overwrite")
    assert ran.code == 2
    for text in ("[bold]moe.yml:1  expert: unknown key (did you mean 'experts'?)", "cheap_embed"):
        assert text in ran.err
    both = command(*words, "--base", models / "base")
    assert both.code == 2
    assert "leave out --base and --expert" in both.err
    missing = command("compose", tmp_path / "out", "--from-mergekit", tmp_path / "none.yml")
    assert missing.code == 2
    assert "cannot read" in missing.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--base MODEL and --expert NAME=MODEL must be given"),
        (("--base", "BASE"), "--expert NAME=MODEL must be given"),
        (("--expert", "a=b"), "--base MODEL must be given"),
        (("--base", "BASE", "--expert", "law"), "it must be NAME=MODEL"),
        (("--base", "BASE", "--expert", "a=BASE", "--expert", "a=BASE"), "there is a 'a' already"),
        (("--base", "BASE", "--expert", "7=BASE"), "must be a word that is no number"),
        (("--base", "BASE", "--expert", "a=BASE", "--top-k", "9"), "top_k (9)"),
        (("--base", "BASE", "--expert", "a=BASE", "--router", "glue"), "'glue'"),
        (("--base", "BASE", "--expert", "a=BASE", "--router", "ridge"), "needs text"),
        (("--base", "BASE", "--expert", "a=BASE", "--data", "t.txt"), "say whose text it is"),
        (("--base", "BASE", "--expert", "a=BASE", "--data", "b=TEXT"), "no such expert"),
        (("--base", "BASE", "--expert", "a=copy:0"), "dense"),
        (("--base", "BASE", "--expert", "a=BASE+nowhere"), "holds no LoRA adapter"),
    ],
)
def test_what_compose_refuses(
    command: Any, models: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    known = {"BASE": str(models / "base"), "TEXT": str(models / "law.txt")}
    ready = []
    for word in words:
        for name, path in known.items():
            word = word.replace(name, path)
        ready.append(word)
    ran = command("compose", tmp_path / "out", *ready)
    assert ran.code == 2, ran.out + ran.err
    assert said in " ".join(ran.err.split()), ran.err
    assert not (tmp_path / "out").exists()


# anchor


def test_anchor(command: Any, models: Path, tmp_path: Path) -> None:
    ran = command("anchor", models / "base", tmp_path / "pair", "--name", "law")
    assert ran.code == 0, ran.err
    assert "exact" in ran.out and "✓ valid" in ran.out
    assert json.loads((tmp_path / "pair" / "freeze.json").read_text())["anchors"] == [0]
    pair = f"law={tmp_path / 'pair'}"
    words = ("--base", models / "base", "--expert", pair, "--preset", "flexolmo", "--no-validate")
    ran = command("compose", tmp_path / "out", *words, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["options"]["router"] == "trained"
    ran = command("anchor", models / "base", tmp_path / "other", "--name", "base")
    assert ran.code == 2
    assert "is taken" in ran.err


# add, swap, remove, expand


def test_add_then_remove(command: Any, models: Path, moe: Path, tmp_path: Path) -> None:
    """The same weights again, byte for byte; removed is validated against masked."""
    grown, again = tmp_path / "grown", tmp_path / "again"
    donor = ("--from", models / "law", "--name", "law2")
    dry = command("add-expert", moe, grown, *donor, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert not grown.exists()
    ran = command("add-expert", moe, grown, *donor)
    assert ran.code == 0, ran.err
    assert "give text for one of its own" in " ".join(ran.out.split())
    ran = command("remove-expert", grown, again, "--expert", "law2", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["validation"]["ok"] is True
    assert set(map(tuple, document["decided"]["kept"].values())) == {(0, 1, 2)}
    first, second = (p / "model.safetensors" for p in (moe, again))
    one, two = mc.Checkpoint.open(first.parent), mc.Checkpoint.open(second.parent)
    assert set(one.tensors) == set(two.tensors)
    assert all(torch.equal(one.read(n), two.read(n)) for n in one.tensors)
    assert one.config == two.config


def test_add_with_text(command: Any, models: Path, moe: Path, tmp_path: Path) -> None:
    """Statistics of the others are measured from their text; a lone file is the new one's."""
    words = ("add-expert", moe, tmp_path / "out", "--from", models / "law", "--name", "more", *FAST)
    own = ("--data", models / "law.txt")
    ran = command(*words, *own)
    assert ran.code == 2
    assert "Give text by expert, --data base=FILE" in " ".join(ran.err.split())
    ran = command(*words, *own, *texts(models, "base", "code"), "--json")
    assert ran.code == 0, ran.err
    assert any("router row of more by ridge" in n for n in json.loads(ran.out)["notes"])
    assert (tmp_path / "out" / "routing_search.json").is_file()


def test_swap(command: Any, models: Path, moe: Path, tmp_path: Path) -> None:
    words = ("swap-expert", moe, tmp_path / "out", "--from", models / "law", "--no-validate")
    ran = command(*words, "--expert", "code", "--name", "law2", "--quiet")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'out'}\n"), ran.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["expert_names"] == ["base", "law", "law2"]
    for wrong, said in (
        (("--expert", "9"), "there is no expert '9'"),
        (("--expert", "code", "--name", "law"), "is taken by expert 1"),
        (("--expert", "code", "--router", "ridge"), "needs"),
        ((), "--expert"),
    ):
        ran = command(*words, *wrong, "--overwrite")
        assert ran.code == 2
        assert said in " ".join(ran.err.split())


def test_expand(command: Any, moe: Path, tmp_path: Path) -> None:
    ran = command("expand", moe, tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["preservation"]["kind"] == "exact"
    assert document["validation"]["ok"] is True
    ran = command("expand", moe, tmp_path / "out")
    assert ran.code == 1
    assert "not empty" in ran.err


@pytest.mark.parametrize("verb", ["add-expert", "swap-expert", "remove-expert", "expand"])
def test_a_dense_model_has_no_experts(
    verb: str, command: Any, models: Path, tmp_path: Path
) -> None:
    more = {
        "add-expert": ("--from", models / "law"),
        "swap-expert": ("--from", models / "law", "--expert", "0"),
        "remove-expert": ("--expert", "0"),
    }
    ran = command(verb, models / "base", tmp_path / "out", *more.get(verb, ()))
    assert ran.code == 2
    assert not (tmp_path / "out").exists()


# pack


def test_pack_and_add(command: Any, models: Path, moe: Path, tmp_path: Path) -> None:
    packed = tmp_path / "[bold]packed"
    words = ("pack-expert", models / "law", packed, "--base", models / "base", "--name", "more")
    composed = tmp_path / "moe"
    three = ("--base", models / "base", "--expert", f"code={models / '[bold]code'}")
    assert command("compose", composed, *three, "--shared", "base", *FAST,
                   *texts(models, "base", "code")).code == 0  # fmt: skip
    ran = command(*words, "--data", models / "law.txt", "--text-tokens", "600", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert (document["name"], document["statistics"]) == ("more", True)
    ran = command(*words, "--overwrite")
    assert ran.code == 0, ran.err
    assert "Packed more of" in ran.out and "without statistics" in ran.out
    assert "add-expert MOE OUTPUT --from" in ran.err
    quiet = command(*words, "--overwrite", "--quiet", "--data", models / "law.txt",
                    "--text-tokens", "600")  # fmt: skip
    assert (quiet.code, quiet.out) == (0, f"{packed}\n")
    ran = command("add-expert", composed, tmp_path / "out", "--from", packed, "--name", "more",
                  "--no-validate", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert any("router row of more by ridge" in n for n in json.loads(ran.out)["notes"])
    ran = command("add-expert", moe, tmp_path / "other", "--from", packed, "--name", "more")
    assert ran.code == 2
    assert "was packed for another base" in " ".join(ran.err.split())


def test_what_packing_needs(command: Any, models: Path, moe: Path, tmp_path: Path) -> None:
    for words, said in (
        ((moe,), "say which of its 3 experts"),
        ((models / "law",), "needs the base"),
        ((moe, "--expert", "9"), "there is no expert '9'"),
    ):
        ran = command("pack-expert", words[0], tmp_path / "out", *words[1:])
        assert ran.code == 2
        assert said in " ".join(ran.err.split())
    assert not (tmp_path / "out").exists()
