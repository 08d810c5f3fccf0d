"""The README says what is so: its options are the options, its files exist, nothing is blank."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from moe_compose_cli.parameters import attribute_docs, flag_of

from moe_compose.architectures import all_architectures
from moe_compose.calibration.options import CalibrateOptions
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.surgery.merge_options import MergeOptions
from moe_compose.surgery.prune_options import PruneOptions
from moe_compose.surgery.upcycle_options import METHODS, UpcycleOptions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "options", [UpcycleOptions, CalibrateOptions, PruneOptions, MergeOptions, EvaluateOptions]
)
def test_option_tables_are_the_dataclasses(options):
    docs = attribute_docs(options)
    for field in fields(options):
        default = "–" if field.default in (None, ()) else f"`{field.default}`"
        assert f"| `{flag_of(field.name)}` | {default} | {docs[field.name]} |" in TEXT


def test_methods_and_targets_are_named():
    for method in METHODS:
        assert f"| `{method}` |" in TEXT
    for form in all_architectures().values():
        if form.twins and not form.parallel_mlp and form.model_type not in OWN:
            assert f"`{form.model_type}`" in TEXT


#: "their own MoE families", not named one by one.
OWN = {"ernie4_5_moe", "hunyuan_v1_moe", "cohere2_moe", "lfm2_moe"}


def test_paths_exist():
    for path in re.findall(r"(?:examples|tests|moe_compose)/[\w./-]+\w", TEXT):
        assert (ROOT / path).exists(), path


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^[A-Z]{5,}$", TEXT, re.MULTILINE)


def test_the_two_commands_are_single_lines():
    lines = [x for x in TEXT.splitlines() if x.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "moe-compose upcycle examples/models/stories260K" in lines[0]
    assert lines[1].endswith("pytest")
