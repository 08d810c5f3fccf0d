"""`validate --engines`: other engines are run where they are installed, the rest is known by rules.

    pytest tests/validation/test_engines.py

mlx-lm is really run, once; elsewhere a shell script says what an engine would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from dense import dense_checkpoint, dense_llama
from moe_compose_cli.main import run
from transformers import Qwen2Config

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.validation import engines
from moe_compose.validation.engines import ENGINES, UnavailableError, ask, difference
from moe_compose.validation.report import Served, ValidationReport


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    dense = dense_llama(tmp_path_factory.mktemp("dense"))
    plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, top_k=2))
    return mc.write(plan, tmp_path_factory.mktemp("out") / "moe")


def engine(report: ValidationReport, name: str) -> Served:
    return next(e for e in report.engines if e.engine == name)


def test_mlx_lm_is_run(moe: mc.Checkpoint) -> None:
    pytest.importorskip("mlx_lm")
    report = mc.validate(moe, engines={})
    found = engine(report, "mlx-lm")
    assert (found.verdict, found.rules, report.ok) == ("same", (), True)
    assert found.version and found.max_error < 1e-4
    assert engine(report, "SGLang").verdict == "not run"
    assert json.loads(json.dumps(report.to_json()))["engines"][-1]["verdict"] == "same"


Answer = dict[str, Any]
ANSWER: Answer = {"prompt": [-1.0, -2.0], "tokens": [5, 6], "logprobs": [-0.5, -0.25]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1, 0.0)),
        ({"prompt": [-1.0, -2.5]}, (1, 0.5)),
        ({"logprobs": [-0.5, -0.5]}, (1, 0.25)),
        ({"tokens": [5, 7], "logprobs": [-0.5, -9.0]}, (0, 0.0)),
        ({"prompt": [-1.0, float("nan")]}, (1, float("inf"))),
    ],
)
def test_difference(changes: Answer, expected: tuple[int, float]) -> None:
    """Logprobs count as far as both say the same tokens; a NaN is as far off as can be."""
    assert difference([ANSWER | changes], [ANSWER]) == expected


def script(path: Path, *lines: str) -> Path:
    """An interpreter that answers so, whatever it is given."""
    said = "\n".join(lines)
    path.write_text(f"#!/bin/sh\ncat > {path}.job\ncat <<'END'\n{said}\nEND\n")
    path.chmod(0o755)
    return path


def test_ask(tmp_path: Path) -> None:
    models = [Path("/a"), Path("/b"), Path("/c")]
    answered = json.dumps({"path": "/a", "answers": [ANSWER], "notes": []})
    python = script(
        tmp_path / "python",
        json.dumps({"version": "9"}),
        answered,
        json.dumps({"path": "/b", "error": "no such class"}),
    )
    version, found = ask("vllm", python, models, [[1, 2, 3]], 2)
    assert version == "9"
    assert found["/a"]["answers"] == [ANSWER]
    assert found["/b"]["error"] == "no such class"
    assert "process ended" in found["/c"]["error"]
    job = json.loads((tmp_path / "python.job").read_text())
    assert job == {"models": ["/a", "/b", "/c"], "prompts": [[1, 2, 3]], "new_tokens": 2}


def test_engines_that_do_not_start(tmp_path: Path) -> None:
    silent = script(tmp_path / "silent", "I am no engine")
    broken = script(tmp_path / "broken", json.dumps({"unavailable": "ImportError: no vllm"}))
    with pytest.raises(UnavailableError, match="no vllm"):
        ask("vllm", broken, [Path("/a")], [[1]])
    with pytest.raises(UnavailableError, match="exit code 0"):
        ask("vllm", silent, [Path("/a")], [[1]])
    (tmp_path / "text").write_text("no program")
    with pytest.raises(UnavailableError, match="does not start"):
        ask("vllm", tmp_path / "text", [Path("/a")], [[1]])


def fake_ask(said: Mapping[str, Any]) -> Any:
    """What `ask` gives when transformers answers, and others what is said."""

    def fake(word: str, python: Any, models: Sequence[Path], prompts: Any) -> Any:
        found = said.get(word, {"answers": [ANSWER] * len(prompts), "notes": []})
        if isinstance(found, Exception):
            raise found
        return "9.9", {str(models[0]): found}

    return fake


OTHER = ANSWER | {"tokens": [5, 8]}
CASES = {
    "same": ({}, "same", True),
    "differs": ({"vllm": {"answers": [OTHER] * 8, "notes": []}}, "differs", False),
    "refuses": ({"vllm": {"error": "KeyError: 'x'"}}, "refuses", False),
    "unavailable": ({"vllm": UnavailableError("ImportError: no vllm")}, "not run", False),
    "no reference": ({"transformers": {"error": "boom"}}, "not run", False),
}


@pytest.mark.parametrize("name", CASES)
def test_an_engine_that_was_asked_for_must_be_the_same(
    name: str, moe: mc.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, verdict, ok = CASES[name]
    monkeypatch.setattr(engines, "ask", fake_ask(said))
    report = mc.validate(moe, engines={"vllm": script(tmp_path / "python")})
    assert (engine(report, "vLLM").verdict, report.ok) == (verdict, ok)


def test_unknown_engines_and_absent_interpreters(moe: mc.Checkpoint) -> None:
    with pytest.raises(mc.OptionError) as caught:
        mc.validate(moe, engines={"ollama": "/nowhere", "sglang": "/nowhere"})
    assert len(caught.value.problems) == 4
    assert "vllm, llama.cpp, mlx-lm" in caught.value.problems[0]


def test_a_plan_an_unsound_one_and_too_little_memory(
    moe: mc.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ask", fake_ask({}))
    monkeypatch.setattr(engines, "_installed", lambda: [("vLLM", Path("python"))])
    plan = mc.expand(moe, mc.ExpandOptions())
    assert "once it is written" in engine(mc.validate(plan, engines={}), "vLLM").detail
    monkeypatch.setattr(engines, "memory_available", lambda: 1000)
    assert "GiB are free" in engine(mc.validate(moe, engines={}), "vLLM").detail
    (tmp_path / "python").touch()
    bad = mc.validate(damaged(moe, tmp_path), engines={})
    assert "fails other checks" in engine(bad, "vLLM").detail


def damaged(moe: mc.Checkpoint, folder: Path) -> mc.Checkpoint:
    from mutants import mutant

    return mutant(moe, folder / "m", lambda t: t.popitem())


def test_rules_go_to_the_engines_that_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Qwen2-MoE that renormalises: an engine that was not asked for may differ."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = dense_checkpoint(
        Qwen2Config(**sizes, **heads, tie_word_embeddings=False), tmp_path / "dense"
    )
    plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=4, top_k=2))
    monkeypatch.setattr(engines, "_installed", lambda: [("mlx-lm", Path("python"))])
    monkeypatch.setattr(engines, "ask", fake_ask({"mlx-lm": {"answers": [OTHER] * 8, "notes": []}}))
    report = mc.validate(mc.write(plan, tmp_path / "moe"), engines={})
    assert engine(report, "mlx-lm").verdict == "differs"
    assert "norm_topk_prob" in engine(report, "mlx-lm").rules[0]
    assert "norm_topk_prob" in engine(report, "llama.cpp").rules[0]
    assert engine(report, "vLLM").rules == ()
    assert report.ok


RULES = [
    (form.model_type, rule.breaks)
    for form in all_architectures().values()
    for rule in form.portable
]


@pytest.mark.parametrize(("family", "breaks"), RULES)
def test_every_rule_names_an_engine(family: str, breaks: str) -> None:
    assert any(engines.names(breaks, e.name) for e in ENGINES)


def test_on_screen(
    moe: mc.Checkpoint,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(engines, "ask", fake_ask({"vllm": {"error": "[b]KeyError[/b]"}}))
    python = script(tmp_path / "python")
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        code = run(["validate", str(moe.path), "--engine-python", f"vllm={python}"])
        out = capfd.readouterr().out
        assert code == 3
        assert max(map(len, out.splitlines())) <= width
        assert "✗ vLLM" in out and "refuses in 9.9: [b]KeyError[/b]" in out
        assert "–  SGLang" in out or "– SGLang" in out
    assert run(["validate", str(moe.path), "--engines", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["engines"]
    assert [e["engine"] for e in found] == [e.name for e in ENGINES]
    assert run(["validate", str(moe.path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["engines"] == []
    assert run(["validate", str(moe.path), "--engine-python", "vllm"]) == 2
