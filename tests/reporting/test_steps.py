"""The surgery history: it travels through chains of operations, and whatever stands in it is shown.

Run: pytest tests/reporting/test_steps.py
"""

from __future__ import annotations

from pathlib import Path

from hand_made import Make, plan_of

import moe_compose as mc
from moe_compose.reporting.documents import history_of
from moe_compose.reporting.inspect import inspect
from moe_compose.reporting.steps import OPTIONS, _defaults, steps_of

KEEP = mc.PruneOptions(criterion="random", keep=3)


def test_a_chain_of_plans_and_a_chain_on_the_disk(make: Make, tmp_path: Path) -> None:
    """Upcycle, prune, remove: at once, and written after the second."""
    upcycled = plan_of(make(), seed=3)
    pruned = mc.prune(upcycled, None, KEEP)
    remove = mc.RemoveOptions(expert=("1",))
    at_once = mc.remove_expert(pruned, remove)
    middle = mc.write(pruned, tmp_path / "middle")
    apart = mc.remove_expert(middle, remove)
    written = mc.write(at_once, tmp_path / "once")
    expected = ["upcycle", "prune", "remove-expert"]
    found = {
        "a plan of plans": inspect(at_once),
        "written at once": inspect(written),
        "a plan of what was written": inspect(apart),
        "written twice": inspect(mc.write(apart, tmp_path / "twice")),
    }
    for name, inspection in found.items():
        steps = list(steps_of(inspection.history))
        assert [s.operation for s in steps] == expected, name
        assert steps[0].sources == ("dense",), name
        assert steps[0].options == {"num_experts": "4", "seed": "3", "target": "mixtral"}, name
        assert [s.options["keep"] for s in steps[1:2]] == ["3"], name
        assert [s.total for s in steps] == sorted((s.total for s in steps), reverse=True), name
        assert steps[0].preservation == "exact" and steps[1].preservation == "none", name
    digests = [[s.digest for s in steps_of(x.history)] for x in found.values()]
    assert digests[0] == digests[1] and digests[2] == digests[3]
    assert [d[:2] for d in digests] == [digests[0][:2]] * 4
    assert steps[2].sources == ("middle",)


def test_several_sources_are_each_told_once(make: Make) -> None:
    base = make()
    donors = {"one": make(name="d1"), "two": make(name="d2")}
    plan = mc.compose(base, donors, mc.ComposeOptions())
    [step] = steps_of(history_of(plan))
    assert step.operation == "compose" and step.sources == ("dense", "d1", "d2")
    assert step.options["expert"] == "one=d1, two=d2"
    assert inspect(plan).experts.names == ("base", "one", "two")
    less = mc.remove_expert(plan, mc.RemoveOptions(expert=("one",)))
    assert inspect(less).experts.names == ("base", "two")
    assert [s.operation for s in steps_of(history_of(less))] == ["compose", "remove-expert"]
    assert inspect(make("mixtral", name="nameless")).experts.names == ()


def test_the_options_of_every_operation_are_found() -> None:
    """Each entry of the table names a dataclass with defaults; a step at its defaults says none."""
    for operation in OPTIONS:
        usual = _defaults(operation)
        assert usual, operation
        given = {n: v for n, v in usual.items() if v is None or isinstance(v, int | float | str)}
        [step] = steps_of([{"operation": operation, "options": given}])
        assert step.options == {}, operation


def test_whatever_stands_in_it() -> None:
    """A record may hold anything; defaults of operations that are not known are shown."""
    odd = [
        {},
        {"operation": 7, "sources": "no list", "options": [1], "preservation": "exact"},
        {"operation": "upcycle", "options": {"top_k": 2, "num_experts": True, "dtype": None}},
        {"operation": "frobnicate", "options": {"a": {"b": [1, 2]}, "c": []}, "sources": [1, {}]},
        {"operation": "merge", "parameters": {"total": "many", "active": True}},
    ]
    steps = list(steps_of(odd))
    assert [s.operation for s in steps] == ["None", "7", "upcycle", "frobnicate", "merge"]
    assert steps[1].sources == () and steps[1].preservation == "?"
    assert steps[2].options == {"num_experts": "True"}
    assert steps[3].options == {"a": "b 1, 2"} and steps[3].sources == ("None",)
    assert steps[4].total is None and steps[4].active is None
