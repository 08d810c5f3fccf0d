"""The model card: what stands in it, and that nothing of an older card is lost.

Run: pytest tests/reporting/test_card.py
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from hand_made import Make, plan_of

from moe_compose.reporting.card import model_card, repeat_line
from moe_compose.reporting.front_matter import split_card
from moe_compose.validation.report import Agreement, Check, Receipt, ValidationReport

OLD_CARD = """---
license: mit
language:
- en
- de
tags: [stories]
model-index:
- name: old
---
# The old model

It wrote stories. <!-- a comment -->
"""


def report(met: bool = True, **check: str) -> ValidationReport:
    agreement = Agreement("float32", 3.2e-5, 2.9e-7, 2.5e-7, 1.9e-12, 1.0, 4.5816, 4.5816, 10.4)
    half = Agreement(
        *("bfloat16", 0.1, 4e-3, 3e-3, 6e-5, 0.992, 4.58, 4.58, 10.4), noise=4e-3, noise_top1=0.99
    )
    receipt = Receipt("dense", "the text", 1020, (agreement, half), "exact", met, "as measured")
    checks = (
        Check("tensors", "pass", "all there"),
        Check("portability", "warn", "a width that vLLM refuses"),
        Check("values", "fail", "not finite", ("lm_head: 3 NaN",)),
    )
    return ValidationReport(checkpoint="out", checks=checks, receipt=receipt)


def test_front_matter_is_merged(make: Make) -> None:
    data, _ = split_card(model_card(plan_of(make(files={"README.md": OLD_CARD})), None))
    assert data["license"] == "mit"
    assert data["language"] == ["en", "de"]
    assert data["tags"] == ["stories", "moe", "moe-compose", "upcycled"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert "model-index" not in data  # the old model's scores are not this one's
    assert "base_model" not in data  # a folder's name is nobody on the Hub


def test_a_source_from_the_hub_is_the_base_model(make: Make) -> None:
    from dataclasses import replace

    source = replace(make(), label="org/dense@v1", revision="c0ffee")
    card = model_card(plan_of(source), None)
    assert split_card(card)[0]["base_model"] == "org/dense"
    assert "[org/dense@v1](https://huggingface.co/org/dense)" in card
    assert "c0ffee" in card


def test_what_was_done_is_said(make: Make) -> None:
    plan = plan_of(make(), seed=17, router_std=0.01)
    card = model_card(plan, None)
    for text in (
        "**Not trained after surgery.**",
        "[arXiv 2212.05055](https://arxiv.org/abs/2212.05055)",
        plan.digest(),
        str(plan.preservation),
        plan.sources["dense"].digest(),
        "| `seed` | `17` |",
        "--seed 17",
        "--router-std 0.01",
        f"{plan.summary().parameters.total:,}",
        "it was not validated",
        "vllm serve",
        "mlx_lm.generate",
        "llama-server",
        "sglang.launch_server",
        "AutoModelForCausalLM",
    ):
        assert text in card, text


def test_the_line_that_repeats_it_gives_the_same_plan(make: Make) -> None:
    import shlex

    allow = ("split-groups", "independent-rows")
    plan = plan_of(make(), method="granular", granularity=2, allow=allow, layers="all", seed=3)
    words = shlex.split(repeat_line(plan).replace("\\\n", " "))
    assert words[:4] == ["moe-compose", "upcycle", "dense", "OUTPUT"]
    assert words.count("--allow") == 2
    given = dict(zip(words[4::2], words[5::2], strict=True))
    assert given["--seed"] == "3" and given["--method"] == "granular"


def test_the_receipt_stands_in_the_card(make: Make) -> None:
    card = model_card(plan_of(make()), report(), source_hashes={"model.safetensors": "ab" * 32})
    assert (
        "| float32 | 3.20e-05 | 2.90e-07 | 2.50e-07 | 1.90e-12 | 100.00% | 4.5816 | 4.5816 |"
        in card
    )
    assert (
        "differs from its own float32 logits by 4.0e-03 (relative, the median token), with 99.00%"
        in card
    )
    assert "**Met**: as measured" in card
    assert "1 pass, 1 warn, 1 fail" in card
    assert "lm_head: 3 NaN" in card
    assert "ab" * 32 in card
    vllm = card[card.index("### vLLM") : card.index("### SGLang")]
    assert "- **Warning:** a width that vLLM refuses" in vllm
    assert "Warning" not in card[card.index("### SGLang") :]


def test_the_same_text_every_time_and_no_paths_or_dates(make: Make, tmp_path: Path) -> None:
    source = make(files={"README.md": OLD_CARD})
    cards = {model_card(plan_of(source), report()) for _ in range(3)}
    assert len(cards) == 1
    card = cards.pop()
    assert str(tmp_path) not in card
    assert not re.search(r"20\d\d-\d\d-\d\d", card)


def test_old_cards_stay_readable_through_a_chain(make: Make) -> None:
    first = model_card(plan_of(make(files={"README.md": OLD_CARD})), report())
    second = model_card(plan_of(make(name="next", files={"README.md": first})), None)
    assert "It wrote stories. <!-- a comment -->" in second
    assert second.count("# The card of the source") == 2
    assert second.index("(next)") < second.index("# The old model")
    assert split_card(second)[0]["tags"].count("upcycled") == 1
    assert second.count("library_name") == 1


def test_a_broken_block_is_kept_as_text(make: Make) -> None:
    for broken in ("---\na: [1\n---\nbody", "---\n- a list\n---\nbody", "no block at all"):
        assert split_card(broken) == ({}, broken)
    card = model_card(plan_of(make(files={"README.md": "---\na: [1\n---\nbody"})), None)
    assert "a: [1\n---\nbody" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_names_are_taken_literally(make: Make) -> None:
    card = model_card(plan_of(make(name="a|b <i> `c`\n```")), report())
    assert "# a\\|b &lt;i> `c` ```: upcycle" in card
    assert "| `a\\|b <i> 'c' '''` |" in card  # in a code span it is no HTML
    assert card.count("\n```") == 2 * 6  # fences: the repeating line, and five engines
