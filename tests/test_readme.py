"""README and guides say what is so: options are the options, commands parse, files exist.

pytest tests/test_readme.py
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs, flag_of
from typer.main import get_command

from moe_compose.architectures import all_architectures
from moe_compose.calibration.options import CalibrateOptions
from moe_compose.calibration.quant_options import QuantPlanOptions
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.surgery.compose_options import ROUTERS, SHARED, ComposeOptions
from moe_compose.surgery.expert_options import AddOptions
from moe_compose.surgery.merge_options import MergeOptions
from moe_compose.surgery.prune_options import CRITERIA, PruneOptions
from moe_compose.surgery.upcycle_options import METHODS, UpcycleOptions
from moe_compose.tradeoff.options import SweepOptions
from moe_compose.training.options import TrainOptions

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples/guides").glob("*.md"))
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in (README, *GUIDES)}
TEXT = PAGES["README.md"]
COMMAND: Any = get_command(app)
COMMANDS: dict[str, Any] = COMMAND.commands

#: Lines that README may have: it is the one page.
LONGEST = 280


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("options", "guide"),
    [
        (UpcycleOptions, "upcycle"),
        (ComposeOptions, "compose"),
        (AddOptions, "experts"),
        (CalibrateOptions, "measure"),
        (EvaluateOptions, "measure"),
        (PruneOptions, "prune"),
        (SweepOptions, "prune"),
        (MergeOptions, "merge"),
        (TrainOptions, "train"),
        (QuantPlanOptions, "quantise"),
    ],
)
def test_option_tables_are_the_dataclasses(options: type, guide: str) -> None:
    """Each table stands in its guide, whole and in the order of the fields."""
    docs, rows = attribute_docs(options), []
    for field in fields(options):
        several = isinstance(field.default, tuple)
        value = ",".join(map(str, field.default)) if several else field.default
        default = "–" if value in (None, "") else f"`{value}`"
        rows.append(f"| `{flag_of(field.name)}` | {default} | {docs[field.name]} |")
    assert "\n".join(("|---|---|---|", *rows, "")) in PAGES[f"examples/guides/{guide}.md"]


def test_methods_and_targets_are_named() -> None:
    guide = PAGES["examples/guides/upcycle.md"]
    for method in METHODS:
        assert f"| `{method}` |" in guide
    for form in all_architectures().values():
        if form.twins and not form.parallel_mlp and form.model_type not in OWN:
            assert f"`{form.model_type}`" in guide


#: "their own MoE families", not named one by one.
OWN = {"ernie4_5_moe", "hunyuan_v1_moe", "cohere2_moe", "lfm2_moe"}


def test_criteria_are_named_with_their_papers() -> None:
    guide = PAGES["examples/guides/prune.md"].splitlines()
    for criterion, (_, paper) in CRITERIA.items():
        lines = [x for x in guide if x.startswith("| `") and f"`{criterion}`" in x]
        assert any(paper.rpartition(" ")[2] in x for x in lines), criterion


def test_what_composes_is_named() -> None:
    for word in (*SHARED, *ROUTERS):
        assert f"`{word}`" in PAGES["examples/guides/compose.md"], word


def test_counts_are_so() -> None:
    """Of criteria and dense families, in the table beside other tools."""
    dense = {twin.dense for form in all_architectures().values() for twin in form.twins}
    assert f"[{len(dense)} dense](" in TEXT
    assert f"| {len(CRITERIA)}, from one pass |" in TEXT


def test_every_command_is_named() -> None:
    for name in COMMANDS:
        assert any(f"moe-compose {name}" in text for text in PAGES.values()), name


def test_readme_is_one_page() -> None:
    assert len(TEXT.splitlines()) <= LONGEST


def test_every_guide_is_linked() -> None:
    for guide in GUIDES:
        assert f"]({guide.relative_to(ROOT)}" in TEXT, guide.name


def test_paths_exist(page: str) -> None:
    ours = re.sub(r"https://[^\s)]+", "", PAGES[page])
    for path in re.findall(r"(?:examples|tests|moe_compose)/[\w./-]+\w", ours):
        assert (ROOT / path).exists(), path


def test_links_lead_somewhere(page: str) -> None:
    """Relative to the page; the heading is there, too."""
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """What headings are called in links: lower case, no punctuation, - for a space."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def test_nothing_is_left_to_fill_in(page: str) -> None:
    assert not re.search(r"^[A-Z]{5,}$", PAGES[page], re.MULTILINE)


def test_the_two_commands_are_single_lines() -> None:
    lines = [x for x in TEXT.splitlines() if x.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "moe-compose upcycle examples/models/stories260K" in lines[0]
    assert lines[1].endswith("pytest -n 2 --dist loadfile")


def blocks(text: str) -> Iterator[str]:
    """Lines of shell code: continued ones are one, comments are gone."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            yield re.sub(r"(^|\s+)#.*", "", line)


def spans(text: str) -> Iterator[str]:
    """Code within lines."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", prose)


def commands(lines: Iterator[str]) -> Iterator[list[str]]:
    """A verb and its arguments, for each time that moe-compose is called."""
    for line in lines:
        for part in re.split(r"&&|\|\||[|;]", line):
            called = re.search(r"(?:^|[\s/])(?:moe-compose|-m moe_compose_cli)\s+(\S.*)", part)
            if called and not called[1].startswith(("-", "VERB")):
                yield [word for word in shlex.split(called[1]) if word != "..."]


def test_commands_parse(page: str) -> None:
    """In blocks: the command is there, each flag is one of its own and takes its value, no argument
    is missing or one too many."""
    for verb, *words in commands(blocks(PAGES[page])):
        assert verb in COMMANDS, verb
        COMMANDS[verb].make_context(verb, words)


def test_commands_in_prose_parse(page: str) -> None:
    """Arguments may be left out there, and so may be `moe-compose`; flags are real ones."""
    whole = commands(spans(PAGES[page]))
    short = (s.split() for s in spans(PAGES[page]) if s.split()[0] in COMMANDS and " -" in s)
    for verb, *words in (*whole, *short):
        assert verb in COMMANDS, verb
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= {"--help", *flags_of(verb)}, (verb, flags)


def test_flags_in_prose_are_real(page: str) -> None:
    """Of some command; those of other programs stand in blocks only."""
    known = {"--help"}.union(*map(flags_of, COMMANDS), *(p.opts for p in COMMAND.params))
    for span in spans(PAGES[page]):
        for flag in re.findall(r"^--[\w-]+", span):
            assert flag in known, span


def flags_of(verb: str) -> set[str]:
    return {o for p in COMMANDS[verb].params for o in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize(
    "line",
    [
        "moe-compose upcycel A B",
        "moe-compose upcycle A B --num-expert 8",
        "moe-compose upcycle A",
        "moe-compose upcycle A B C",
        "moe-compose upcycle A B --top-k",
        "moe-compose upcycle A B --top-k many",
        "pip install x && moe-compose prune A B --keep 4 \\\n    --stat S",
    ],
)
def test_faulty_commands_are_noticed(line: str) -> None:
    """The control of the tests above."""
    [(verb, *words)] = commands(blocks(f"```sh\n{line}   # as `--keep`\n```"))
    with pytest.raises(
        Exception, match=r"upcycel|No such|Missing|unexpected|requires|valid integer"
    ):
        COMMANDS[verb].make_context(verb, words)
