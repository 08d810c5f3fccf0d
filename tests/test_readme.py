"""The README says what is so: its options are the options, its files exist, nothing is blank."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from moe_compose_cli.parameters import attribute_docs, flag_of

from moe_compose.architectures import all_architectures
from moe_compose.calibration.options import CalibrateOptions
from moe_compose.calibration.quant_options import QuantPlanOptions
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.surgery.add_expert import AddOptions
from moe_compose.surgery.compose_options import ROUTERS, SHARED, ComposeOptions
from moe_compose.surgery.merge_options import MergeOptions
from moe_compose.surgery.prune_options import CRITERIA, PruneOptions
from moe_compose.surgery.upcycle_options import METHODS, UpcycleOptions
from moe_compose.tradeoff.options import SweepOptions
from moe_compose.training.options import TrainOptions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        *(UpcycleOptions, ComposeOptions, AddOptions, CalibrateOptions),
        *(PruneOptions, MergeOptions, EvaluateOptions, SweepOptions, TrainOptions),
        QuantPlanOptions,
    ],
)
def test_option_tables_are_the_dataclasses(options):
    docs = attribute_docs(options)
    for field in fields(options):
        several = isinstance(field.default, tuple)
        value = ",".join(map(str, field.default)) if several else field.default
        default = "–" if value in (None, "") else f"`{value}`"
        assert f"| `{flag_of(field.name)}` | {default} | {docs[field.name]} |" in TEXT


def test_methods_and_targets_are_named():
    for method in METHODS:
        assert f"| `{method}` |" in TEXT
    for form in all_architectures().values():
        if form.twins and not form.parallel_mlp and form.model_type not in OWN:
            assert f"`{form.model_type}`" in TEXT


#: "their own MoE families", not named one by one.
OWN = {"ernie4_5_moe", "hunyuan_v1_moe", "cohere2_moe", "lfm2_moe"}


def test_criteria_are_named_with_their_papers():
    for criterion, (_, paper) in CRITERIA.items():
        lines = [x for x in TEXT.splitlines() if x.startswith("| `") and f"`{criterion}`" in x]
        assert any(paper.rpartition(" ")[2] in x for x in lines), criterion


def test_what_composes_is_named():
    for word in (*SHARED, *ROUTERS):
        assert f"`{word}`" in TEXT, word


def test_paths_exist():
    for path in re.findall(r"(?:examples|tests|moe_compose)/[\w./-]+\w", TEXT):
        assert (ROOT / path).exists(), path


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^[A-Z]{5,}$", TEXT, re.MULTILINE)


def test_the_two_commands_are_single_lines():
    lines = [x for x in TEXT.splitlines() if x.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "moe-compose upcycle examples/models/stories260K" in lines[0]
    assert lines[1].endswith("pytest -n 2 --dist loadfile")
