"""Code that came with a checkpoint never runs, whatever stands on stdin.

Run: pytest tests/cli/test_foreign_code.py
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from dense_models import read_config, write_config
from tiny_models import tiny_checkpoint
from transformers import AutoConfig

from moe_compose.runtime.pretrained import load_config, without_code
from moe_compose.validation.engines import code_left_out

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "examples/models/stories260K"

#: Leaves a mark when it is imported, and is a config class all the same.
CODE = """
from pathlib import Path
from transformers import {base}
Path({mark!r}).touch()
class {name}({base}):
    model_type = "hostile"
"""


def hostile(folder: Path, mark: Path, model_type: str = "qwen3_moe") -> Path:
    """A tiny mixture whose config names Python files for everything."""
    own = "deepseek_v3" if model_type == "kimi_k2" else "qwen3_moe"
    tiny_checkpoint(own, folder, vocab_size=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, folder / name)
    for base, name in (("PreTrainedConfig", "HostileConfig"), ("PreTrainedModel", "HostileModel")):
        code = CODE.format(base=base, name=name, mark=str(mark))
        (folder / f"{name.lower()}.py").write_text(code)
    auto_map = {
        "AutoConfig": "hostileconfig.HostileConfig",
        "AutoModelForCausalLM": "hostilemodel.HostileModel",
    }
    config = {**read_config(folder), "model_type": model_type, "auto_map": auto_map}
    write_config(folder, config)
    return folder


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told to go ahead."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a little dog. " * 40)
    return file


def test_control_transformers_would_run_it(yes: None, tmp_path: Path) -> None:
    """The trap works: asked by transformers and answered from stdin, the code runs."""
    mark = tmp_path / "mark"
    folder = hostile(tmp_path / "m", mark, "kimi_k2")
    AutoConfig.from_pretrained(folder)
    assert mark.exists()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "kimi_k2"])
def test_one_way_from_a_config_to_its_class(
    command: Any, yes: None, text: Path, tmp_path: Path, model_type: str
) -> None:
    """What calibrates also prunes, and is checked by the class that ran it."""
    mark = tmp_path / "mark"
    folder = hostile(tmp_path / "m", mark, model_type)
    words = ("--domain", f"a={text}", "--tokens", "200", "--seq-len", "32")
    assert command("calibrate", folder, tmp_path / "stats", *words).code == 0
    where = ("--keep", "6", "--stats", tmp_path / "stats", "--json")
    ran = command("prune", folder, tmp_path / "out", *where)
    assert ran.code == 0, ran.err
    checks = {c["name"]: c["status"] for c in json.loads(ran.out)["validation"]["checks"]}
    assert checks["config"] == checks["tensors"] == "pass"
    assert not mark.exists()


def test_kernels_of_the_hub_are_code_too() -> None:
    """An attention or experts implementation with a slash in it is a repository to be run."""
    config = {
        "attn_implementation": "sdpa",
        "_attn_implementation": "somebody/kernel@v1",
        "text_config": {"auto_map": {"AutoModel": "x.Y"}, "experts_implementation": {"": "a/b"}},
        "parts": [{"auto_map": {}, "vocab_size": 8}],
    }
    assert without_code(config) == {
        "attn_implementation": "sdpa",
        "text_config": {},
        "parts": [{"vocab_size": 8}],
    }


def test_a_kernel_in_a_config_is_not_asked_for(tmp_path: Path) -> None:
    tiny_checkpoint("qwen3_moe", tmp_path / "m")
    config = {**read_config(tmp_path / "m"), "attn_implementation": "somebody/kernel"}
    assert load_config(config)._attn_implementation is None
    write_config(tmp_path / "m", config)
    assert AutoConfig.from_pretrained(tmp_path / "m")._attn_implementation == "somebody/kernel"


def test_engines_get_the_checkpoint_without_its_code(tmp_path: Path) -> None:
    """Some of them run it unasked: converters, and `model_file` in older mlx-lm."""
    folder = hostile(tmp_path / "m", tmp_path / "mark")
    write_config(folder, {**read_config(folder), "model_file": "hostilemodel.py"})
    with code_left_out(folder) as seen:
        assert seen is not None
        assert not list(seen.glob("*.py"))
        assert read_config(seen).keys() == read_config(folder).keys() - {"auto_map", "model_file"}
        names = {p.name for p in folder.iterdir() if p.suffix != ".py"}
        assert {p.name for p in seen.iterdir()} == names
        there = next(p for p in seen.iterdir() if p.suffix == ".safetensors")
        assert there.resolve() == (folder / there.name).resolve()
    tiny_checkpoint("qwen3_moe", tmp_path / "plain")
    with code_left_out(tmp_path / "plain") as seen:
        assert seen == tmp_path / "plain"
