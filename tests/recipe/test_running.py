"""Recipes carried out: rehearsed first, chained without writing, resumed.

pytest tests/recipe/test_running.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moe_compose as mc
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import MoeComposeError, OptionError, WriteError
from moe_compose.recipe.reading import Recipe, parse_recipe
from moe_compose.recipe.running import rehearse, run_recipe
from moe_compose.recipe.state import Watch, Written

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "stories260K"
STORY = "Once upon a time there was a little girl who had a red ball. She played. "


class Told(Watch):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.done: list[Written] = []
        self.begun: list[str] = []
        self.counted: list[str] = []
        self.results: dict[str, Any] = {}

    def begins(self, step: int, operation: str) -> None:
        self.begun.append(operation)

    def found(self, step: int, operation: str, result: Any) -> None:
        self.results[operation] = result

    def written(self, done: Written) -> None:
        self.done.append(done)

    def counting(self, what: str, unit: str = "bytes") -> Any:
        self.counted.append(what.partition(" ")[0])
        return super().counting(what, unit)


def content(source: TensorSource) -> dict[str, bytes]:
    return {n: source.read(n).contiguous().numpy().tobytes() for n in source.tensors}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(STORY.replace("red", f"{n}") for n in range(24)))
    return path


def recipe(steps: str, out: Path, **names: object) -> Recipe:
    """The steps under the tiny model, unvalidated."""
    filled = steps.format(model=MODEL, **names)
    return parse_recipe(f"steps:{filled}\noutput: {out}\nvalidate: false\n", "r.yaml")


def test_a_condition_that_does_not_hold(tmp_path: Path) -> None:
    """What was saved before stays, nothing else is written, and the step is named."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who had a red ball. " * 20)
    recipe = parse_recipe(
        f"""
steps:
  - operation: upcycle
    source: {MODEL}
    num_experts: 4
    method: drop
    save: {tmp_path / "saved"}
  - operation: prune
    keep: 2
    criterion: random
    assert: {{max_kl: 0.000001, data: {text}, tokens: 64}}
output: {tmp_path / "out"}
validate: false
""",
        "r.yaml",
    )
    watch = Told()
    with pytest.raises(MoeComposeError, match=r"r.yaml:8  steps.1 \(prune\): a condition") as e:
        run_recipe(recipe, watch=watch)
    assert "at most 1e-06" in e.value.problems[0]
    assert (tmp_path / "saved" / "config.json").is_file()
    assert not (tmp_path / "out").exists()
    assert [x.step for x in watch.done] == [0]


def test_chained_is_one_after_another(tmp_path: Path) -> None:
    """A fused chain gives what its steps give when each is written and read again."""
    chain = """
steps:
  - {{operation: upcycle, source: {model}, num_experts: 6, method: drop}}
  - {{operation: prune, keep: 4, criterion: random, seed: 3{save}}}
  - {{operation: expand, factor: 2}}
output: {out}
validate: false
"""
    found = {}
    for name, save in (("fused", ""), ("apart", f", save: {tmp_path / 'between'}")):
        text = chain.format(model=MODEL, save=save, out=tmp_path / name)
        found[name] = run_recipe(parse_recipe(text))[-1].checkpoint
    assert (tmp_path / "between" / "config.json").is_file()
    assert content(found["fused"]) == content(found["apart"])
    history = json.loads((tmp_path / "fused" / "moe_compose.json").read_text())
    assert [r["operation"] for r in history] == ["upcycle", "prune", "expand"]


MEASURED = """
  - {{operation: upcycle, source: {model}, num_experts: 6, method: noise}}
  - {{operation: calibrate, data: {text}, tokens: 256, seq_len: 64}}
  - {{operation: prune, keep: 4{more}}}
"""


def test_what_is_missing_is_said_at_once(tmp_path: Path, text: Path) -> None:
    """Every file, each with its line, before anything is opened."""
    steps = """
  - {{operation: upcycle, source: nowhere}}
  - {{operation: calibrate, data: [{text}, none.txt]}}
  - operation: prune
    keep: 4
    stats: no/stats
    assert: {{max_kl: 1, data: neither.txt}}
"""
    with pytest.raises(OptionError, match="files that are not there") as caught:
        run_recipe(recipe(steps, tmp_path / "out", text=text))
    assert list(caught.value.problems) == [
        "r.yaml:3  steps.1.data: there is no none.txt",
        "r.yaml:6  steps.2.stats: there is no no/stats",
        "r.yaml:7  steps.2.assert: there is no neither.txt",
    ]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("{{operation: prune, keep: 9}}", r"r.yaml:5  steps.3 \(prune\): cannot prune"),
        ("{{operation: merge, keep: 2}}", "merge needs a calibrate step with similarities"),
        ("{{operation: prune, keep: 3, criterion: loo-mse}}", "needs loo_tokens"),
        ("{{operation: expand, source: steps.7}}", "steps.7 is no earlier step"),
        ("{{operation: train-router, data: {text}, teacher: steps.0}}", "teacher has no meaning"),
        ("{{operation: evaluate, data: {text}, out: {taken}}}", "is there already"),
        ("{{operation: report, out: page.txt}}", "must end in .html"),
        ("{{operation: report, source: steps.0, out: page.html}}", "a checkpoint that is written"),
        ("{{operation: refit, data: {text}}}", "with nothing saved between"),
        (
            "{{operation: prune, keep: 3, max_kl: 1, data: {text}}}",
            "leave keep, ratio and size out",
        ),
        ("{{operation: prune, keep: 3, criterion: random, data: {{x: {text}}}}}", "compared on"),
        (
            "{{operation: pack-expert, expert: 1, save: {taken}}}",
            "not a folder|is a file|not empty",
        ),
        ("{{operation: add-expert, from: copy:0, router: copy, data: {text}}}", "no use with"),
        ("{{operation: expand, factor: 2, save: {saved}}}", "an earlier step writes"),
    ],
)
def test_the_last_fault_is_said_before_the_first_step(
    tmp_path: Path, text: Path, last: str, said: str
) -> None:
    steps = """
  - {{operation: upcycle, source: {model}, num_experts: 6}}
  - {{operation: calibrate, data: {text}, tokens: 256}}
  - {{operation: prune, keep: 5, save: {saved}}}
  - """
    steps = steps.replace("prune, keep: 5", "prune, keep: 5, source: steps.0")
    names = {"text": text, "saved": tmp_path / "saved", "taken": text}
    again = last.replace("operation: prune", "operation: prune, source: steps.0")
    again = again.replace("operation: merge", "operation: merge, source: steps.0")
    again += "\n  - {{operation: expand, source: steps.0}}"
    watch = Told()
    with pytest.raises(MoeComposeError, match=said):
        run_recipe(recipe(steps + again, tmp_path / "out", **names), watch=watch)
    assert watch.begun == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_a_calibration_of_another_model(tmp_path: Path, text: Path) -> None:
    more = "}\n  - {operation: prune, keep: 3"
    steps = MEASURED.replace("{more}", more.replace("{", "{{").replace("}", "}}"))
    with pytest.raises(OptionError, match="measured another model") as caught:
        rehearse(recipe(steps, tmp_path / "out", text=text))
    assert "source: steps.N" in caught.value.hint


def test_places_are_looked_at_first(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(WriteError, match="not empty"):
        rehearse(recipe(MEASURED, out, text=text, more=""))


def test_a_rehearsal_reads_no_weights(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of step that makes a model, its text, statistics and places included."""
    steps = """
  - {{operation: upcycle, source: {model}, num_experts: 6}}
  - {{operation: calibrate, data: {text}, tokens: 256, similarity: true, save: {folder}/stats}}
  - {{operation: merge, keep: 5, stats: {folder}/stats, refit: true, refit_on: {text}}}
  - {{operation: prune, criterion: aimer, max_kl: 1, data: {text}, save: {folder}/saved}}
  - {{operation: refit, data: {text}, source: 1}}
  - {{operation: train-router, objective: distill, data: {text}}}
  - {{operation: add-expert, from: "{folder}/saved#0", data: {text}, name: more}}
  - {{operation: pack-expert, expert: more, save: {folder}/packed}}
  - {{operation: swap-expert, expert: more, from: {folder}/packed, router: keep}}
  - {{operation: evaluate, data: {text}, against: steps.0, out: {folder}/x/figures.json}}
""".replace(", source: 1", "").replace("refit, data: {text}", "expand, factor: 2")
    read: list[str] = []
    monkeypatch.setattr(mc.Checkpoint, "read", lambda self, name: read.append(name))
    monkeypatch.setattr(mc.Checkpoint, "stream", lambda self, name: read.append(name))
    rehearse(recipe(steps, tmp_path / "out", text=text, folder=tmp_path))
    assert read == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_an_interrupted_run_goes_on(tmp_path: Path, text: Path) -> None:
    """What was measured is kept until the run comes to its end, and not measured again."""
    out = tmp_path / "out"

    def asked(limit: float) -> Recipe:
        condition = f", assert: {{{{max_kl: {limit}, data: {text}, tokens: 64}}}}"
        return recipe(MEASURED.replace("{more}", condition), out, text=text)

    with pytest.raises(MoeComposeError, match="a condition does not hold") as caught:
        run_recipe(asked(1e-9))
    assert "--resume" in caught.value.hint
    assert (tmp_path / "out.run" / "1-calibrate" / "stats").is_dir()
    with pytest.raises(WriteError, match="holds a run that was interrupted"):
        run_recipe(asked(50))
    watch = Told()
    [done] = run_recipe(asked(50), resume=True, watch=watch)
    assert done.folder == out
    assert watch.counted == ["measuring", "writing"]  # the condition, not the calibration
    assert not (tmp_path / "out.run").exists()
    before = content(done.checkpoint)
    assert content(run_recipe(asked(50), overwrite=True)[-1].checkpoint) == before


def test_statistics_of_other_text_are_not_taken_up(tmp_path: Path, text: Path) -> None:
    steps = MEASURED.replace("seq_len: 64", "seq_len: 64, save: {stats}")
    names = {"text": text, "more": "", "stats": tmp_path / "stats"}
    run_recipe(recipe(steps, tmp_path / "out", **names))
    text.write_text(text.read_text() + "<|endoftext|>And then it rained for a week. " * 40)
    with pytest.raises(WriteError, match="measured on other text"):
        run_recipe(recipe(steps, tmp_path / "out", **names), resume=True)


def test_results_of_earlier_steps(tmp_path: Path) -> None:
    """`steps.N` is that step's result, wherever a model is asked for; folders are as well."""
    steps = """
  - {{operation: upcycle, source: {model}, num_experts: 4, save: {saved}}}
  - {{operation: prune, keep: 2, criterion: random}}
  - {{operation: expand, source: {saved}, factor: 2}}
  - {{operation: add-expert, source: steps.1, from: "steps.2#7", name: last}}
"""
    saved = tmp_path / "saved"
    [first, last] = run_recipe(recipe(steps, tmp_path / "out", saved=saved))
    assert first.folder == saved
    grown = mc.expand(mc.Checkpoint.open(saved), mc.ExpandOptions(factor=2))
    small = mc.prune(first.checkpoint, None, mc.PruneOptions(keep=2, criterion="random"))
    donor = mc.Donor("x", grown, 7)
    assert content(last.checkpoint) == content(
        mc.add_expert(small, donor, mc.AddOptions(name="last"))
    )


def test_a_refit_is_held_to_what_was_pruned(tmp_path: Path, text: Path) -> None:
    """Its condition is about the unpruned model; that a reference may be named is the control."""
    more = "}\n  - {operation: refit, data: @, tokens: 512, held_out: 2, seq_len: 64, assert: "
    found = []
    for against in ("", ", against: steps.2"):
        condition = f"{{max_kl: 1e-9, data: @, tokens: 64{against}}}"
        tail = (more + condition).replace("@", str(text)).replace("{", "{{").replace("}", "}}")
        with pytest.raises(MoeComposeError, match="does not hold") as caught:
            run_recipe(
                recipe(MEASURED.replace("{more}", tail), tmp_path / "out", text=text),
                overwrite=True,
            )
        found.append(float(caught.value.problems[0].split()[1]))
    assert found[0] != found[1]


def test_findings_alone_need_no_output(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "deep" / "figures.json"
    step = (
        f"steps: [{{operation: evaluate, source: {MODEL}, data: {text}, tokens: 64, out: {out}}}]"
    )
    watch = Told()
    assert run_recipe(parse_recipe(step), watch=watch) == []
    assert json.loads(out.read_text())["overall"]["loss"] == watch.results["evaluate"].overall.loss
    with pytest.raises(OptionError) as caught:
        parse_recipe(step + "\noutput: o")
    assert "no step makes a model" in str(caught.value)


def test_the_last_result_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before any work whether it can be; only the last, and only what is written."""
    pushed: list[tuple[str, str, bool]] = []

    def push(checkpoint: mc.Checkpoint, repo: str, *, private: bool) -> str:
        pushed.append((checkpoint.label, repo, private))
        return f"https://hub/{repo}"

    monkeypatch.setattr("moe_compose.reporting.hub.push", push)
    steps = f"""
  - {{operation: upcycle, source: {MODEL}, num_experts: 4, save: {tmp_path / "first"}}}
  - {{operation: expand, factor: 2}}
"""
    text = f"steps:{steps}\noutput: {tmp_path / 'out'}\nvalidate: false\nprivate: true\n"
    with pytest.raises(OptionError, match="private has no meaning"):
        run_recipe(parse_recipe(text))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OptionError, match="nobody is logged in"):
        run_recipe(parse_recipe(f"{text}push_to_hub: me/moe\n"))
    assert not (tmp_path / "first").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    [_, last] = run_recipe(parse_recipe(f"{text}push_to_hub: me/moe\n"))
    assert pushed == [("out", "me/moe", True)] and last.pushed == "https://hub/me/moe"


def test_what_is_composed_is_held_to_its_base(tmp_path: Path) -> None:
    """And not to the pair that an earlier step made."""
    steps = """
  - {{operation: anchor, source: {model}, name: tales, save: {pair}}}
  - {{operation: compose, base: {model}, expert: ["tales={pair}"], preset: flexolmo}}
"""
    seen: list[str] = []

    class Labels(Watch):
        def waiting(self, what: str) -> Any:
            seen.append(what)
            return super().waiting(what)

    filled = steps.format(model=MODEL, pair=tmp_path / "pair")
    run_recipe(parse_recipe(f"steps:{filled}\noutput: {tmp_path / 'out'}"), watch=Labels())
    assert seen[-1] == "validating out against stories260K"


def test_a_calibration_in_between_moves_nothing(tmp_path: Path, text: Path) -> None:
    """Steps that find something leave the last result where it is."""
    steps = """
  - {{operation: upcycle, source: {model}, num_experts: 4}}
  - {{operation: prune, keep: 2, criterion: random}}
  - {{operation: calibrate, source: steps.0, data: {text}, tokens: 128}}
  - {{operation: expand, factor: 2}}
"""
    [done] = run_recipe(recipe(steps, tmp_path / "out", text=text))
    assert done.checkpoint.config["num_local_experts"] == 4


def test_a_folder_of_somebody_else_stays(tmp_path: Path, text: Path) -> None:
    mine = tmp_path / "out.run" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(WriteError, match="holds no run of a recipe"):
        run_recipe(recipe(MEASURED, tmp_path / "out", text=text, more=""), overwrite=True)
    assert mine.read_text() == "mine"


def test_statistics_that_were_measured_otherwise(tmp_path: Path, text: Path) -> None:
    """The same text, but no experts masked."""
    steps = MEASURED.replace("seq_len: 64", "seq_len: 64{loo}, save: {stats}")
    names = {"text": text, "more": "", "stats": tmp_path / "stats"}
    run_recipe(recipe(steps, tmp_path / "out", loo="", **names))
    with pytest.raises(WriteError, match="or otherwise"):
        run_recipe(recipe(steps, tmp_path / "out", loo=", loo_tokens: 32", **names), resume=True)
