"""The part of a model card that a validation fills in: receipt, checks, and how to serve.

It stands between two comment lines, so that a later validation can renew it and leave the rest of
the card, whoever wrote it, as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from moe_compose.reporting.markdown import cell, table
from moe_compose.validation.report import Agreement, Check, Receipt, ValidationReport

BEGIN, END = "<!-- moe-compose: measured -->", "<!-- moe-compose: end of measured -->"

_SIGNS = {"pass": "✓", "warn": "!", "fail": "✗", "skip": "–"}

#: Engine → words that name it in a check, and the lines that serve a model with it.
_ENGINES = {
    "transformers": (
        ("transformers",),
        "python",
        """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))""",
    ),
    "vLLM": (("vllm",), "sh", "vllm serve ."),
    "SGLang": (("sglang",), "sh", "python -m sglang.launch_server --model-path ."),
    "llama.cpp": (
        ("llama.cpp", "gguf"),
        "sh",
        "python convert_hf_to_gguf.py . --outfile model.gguf\nllama-server -m model.gguf",
    ),
    "mlx-lm": (("mlx",), "sh", 'mlx_lm.generate --model . --prompt "Once upon a time"'),
}


def measured(report: ValidationReport | None) -> str:
    """The part, with its comment lines."""
    lines = [BEGIN, ""]
    lines += _receipt(report.receipt if report else None, report is not None)
    lines += _checks(report.checks) if report else []
    lines += ["## How to serve", "", *_serving(report.checks if report else ())]
    return "\n".join([*lines, END])


def renew(card: str, report: ValidationReport) -> str | None:
    """A card with its measured part made anew; None for a card that has none.

    Only the first is renewed: those further down belong to the cards of sources.
    """
    before, found, rest = card.partition(BEGIN)
    _, closed, after = rest.partition(END)
    return before + measured(report) + after if found and closed else None


def _receipt(receipt: Receipt | None, validated: bool) -> Iterator[str]:
    yield from ("## Step-0 receipt", "")
    if receipt is None:
        what = "it was validated by itself" if validated else "it was not validated"
        yield from (f"The result was not compared with its source: {what}.", "")
        return
    yield (
        f"Logits of {cell(receipt.against)} and of this model on {cell(receipt.text)}, "
        f"{receipt.tokens} tokens. Losses and divergences in nats per token."
    )
    yield ""
    head = ("dtype", "max error", "relative error", "median", "KL", "top-1 agreement", "loss")
    yield from table((*head, "loss of the source"), [_agreement_row(a) for a in receipt.agreements])
    yield ""
    for a in receipt.agreements:
        if a.noise is not None and a.noise_top1 is not None:
            yield (
                f"In {a.dtype} the source itself differs from its own float32 logits by "
                f"{a.noise:.1e} (relative, the median token), with {a.noise_top1:.2%} top-1 "
                "agreement."
            )
            yield ""
    yield from (f"Stated: {cell(receipt.stated)}.", "")
    yield from (f"**{'Met' if receipt.met else 'Not met'}**: {cell(receipt.verdict)}.", "")


def _agreement_row(a: Agreement) -> tuple[str, ...]:
    return (
        a.dtype,
        f"{a.max_error:.2e}",
        f"{a.relative_error:.2e}",
        f"{a.median_error:.2e}",
        f"{a.kl:.2e}",
        f"{a.top1:.2%}",
        f"{a.loss:.4f}",
        f"{a.reference_loss:.4f}",
    )


def _checks(checks: tuple[Check, ...]) -> Iterator[str]:
    counts = {status: sum(c.status == status for c in checks) for status in _SIGNS}
    said = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    yield from ("## Checks", "", f"{said or 'none'}.", "")
    rows = [(_SIGNS[c.status], cell(c.name), cell(_found(c))) for c in checks]
    yield from table(("", "check", "found"), rows)
    yield ""


def _found(check: Check) -> str:
    shown = check.problems[:5]
    more = [f"and {len(check.problems) - 5} more"] if len(check.problems) > 5 else []
    return "; ".join((check.detail, *shown, *more))


def _serving(checks: tuple[Check, ...]) -> Iterator[str]:
    """Lines for each engine, after what the checks say of it."""
    for engine, (words, language, lines) in _ENGINES.items():
        yield from (f"### {engine}", "")
        warnings = list(_warnings(checks, words))
        yield from (f"- **Warning:** {cell(text)}" for text in warnings)
        yield from ["", *_code(language, lines)] if warnings else _code(language, lines)
        yield ""


def _warnings(checks: tuple[Check, ...], words: tuple[str, ...]) -> Iterator[str]:
    """What failed and warned checks say of an engine."""
    named = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    for check in checks:
        if check.status in ("warn", "fail"):
            yield from (t for t in (check.problems or (check.detail,)) if named.search(t))


def _code(language: str, lines: str) -> list[str]:
    return [f"```{language}", *lines.split("\n"), "```"]
