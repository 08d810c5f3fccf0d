"""The model card of a result: what was done to what, how exact it is, and how to serve it.

The same plan and report give the same text: it holds no dates and no paths. The card of the source
stays readable under the last heading, so that a chain of operations keeps the whole story.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_compose.architectures import find
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.reporting.documents import history_of
from moe_compose.reporting.front_matter import front_matter, hub_id, leaves, read_card
from moe_compose.reporting.inspection import CONVENTION, parts_of
from moe_compose.reporting.markdown import cell, code, table
from moe_compose.reporting.receipt import measured
from moe_compose.reporting.units import bytes_text, count
from moe_compose.surgery.merge_options import MERGE_METHODS
from moe_compose.surgery.plan import UNTRAINED, Plan, PlanSummary
from moe_compose.surgery.prune_options import CRITERIA
from moe_compose.surgery.replace import FINISHING, Changed
from moe_compose.surgery.upcycle_options import METHODS
from moe_compose.validation.report import ValidationReport
from moe_compose.version import __version__

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def model_card(
    plan: Plan,
    report: ValidationReport | None,
    *,
    source_hashes: Mapping[str, str] | None = None,
) -> str:
    """The `README.md` of a plan's result.

    Args:
        plan: what was done.
        report: what was measured; None before anything was.
        source_hashes: file of weights of a source → hex SHA-256 of its bytes.

    Returns:
        Markdown with a YAML block in front. Licence, languages and tags of the source's card are
        kept, and its body stands under the last heading.
    """
    inherited, body = read_card(_old_card(plan))
    sections = [
        front_matter(plan, inherited),
        *_opening(plan),
        *_done(plan),
        *_sources(plan, source_hashes or {}),
        *_options(plan),
        *_history(plan),
        *_model(plan, plan.summary()),
        measured(report),
    ]
    if body:
        labels = ", ".join(cell(s.label) for s in leaves(plan) if not isinstance(s, Changed))
        sections += ["", "---", "", f"# The card of the source ({labels})", "", body]
    return "\n".join(sections) + "\n"


def with_hashes(card: str, plan: Plan, source_hashes: Mapping[str, str]) -> str:
    """A plan's card with the table of hashes added; as it is where its sources are not shown as
    `model_card` shows them, or the table is there.
    """
    bare, full = ("\n".join(_sources(plan, known)) for known in ({}, source_hashes))
    return card if full in card else card.replace(bare, full, 1)


#: What asks for them, where that is not said by options.
_ASKED_BY: Mapping[str, Mapping[str, Any]] = {"refit": {"refit": True}}


def repeat_line(plan: Plan) -> str:
    """The command that makes the same result from the same sources.

    Folders are named by their last part, since where they were says nothing to anybody else.
    """
    first = next(iter(plan.sources.values()))
    if plan.operation in FINISHING and isinstance(first, Plan):
        more = {**_ASKED_BY.get(plan.operation, {}), **plan.options}
        return _with_flags(repeat_line(first).split(" \\\n"), more)
    positional = [] if "base" in plan.options else [" ".join(first.label.split())]
    words = ["moe-compose", plan.operation, *positional, "OUTPUT"]
    return _with_flags([" ".join(map(shlex.quote, words))], plan.options)


def _with_flags(lines: list[str], options: Mapping[str, Any]) -> str:
    """The lines of a command with more flags, folded."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for given in value if isinstance(value, tuple | list) else (value,):
            if given is None:
                continue
            word = f"{flag} {shlex.quote(str(given))}"
            if isinstance(given, bool):
                word = flag if given else f"--no-{flag[2:]}"
            if len(lines) > 1 and len(lines[-1]) + len(word) < 80:
                lines[-1] += f" {word}"
            else:
                lines.append(f"  {word}")
    return " \\\n".join(lines)


def method_of(plan: Plan) -> tuple[str, str, str] | None:
    """Name, summary and paper of the method a plan follows; None for an operation without any."""
    criterion = str(plan.options.get("criterion"))
    if plan.operation == "prune" and criterion in CRITERIA:
        summary, paper = CRITERIA[criterion]
        return criterion, f"keeps {summary}", paper
    name = str(plan.options.get("method"))
    if plan.operation == "merge" and name in MERGE_METHODS:
        summary, paper = MERGE_METHODS[name]
        return name, summary, paper
    if plan.operation != "upcycle" or name not in METHODS:
        return None
    return name, METHODS[name].summary, METHODS[name].paper


def _old_card(plan: Plan) -> Path | None:
    """The card of the source; of a plan of a plan, that of the first source which has one."""
    earlier = (s for s in plan.sources.values() if isinstance(s, Plan))
    return plan.card or next(filter(None, map(_old_card, earlier)), None)


def _opening(plan: Plan) -> Iterator[str]:
    origins = [s for s in leaves(plan) if not isinstance(s, Changed)]
    labels = " and ".join(map(_linked, origins))
    form = find(plan.config)
    shape = ""
    if form is not None and form.is_moe:
        moe = form.moe(plan.config)
        shape = f" with {moe.num_experts} experts, {moe.top_k} per token"
    titles = ", ".join(cell(s.label) for s in origins)
    yield f"# {titles}: {_verbs(plan)}{shape}"
    yield ""
    kind = cell(str(plan.config.get("model_type")))
    yield f"A mixture of experts ({kind}{shape}), made from {labels} by moe-compose {__version__}."
    if UNTRAINED in plan.notes:
        yield ""
        yield f"**{UNTRAINED.capitalize()}.**"
    yield ""


def _verbs(plan: Plan) -> str:
    """What was done, in order, of plans of plans too."""
    earlier = [s for s in plan.sources.values() if isinstance(s, Plan)]
    return ", ".join([*map(_verbs, earlier), plan.operation])


def _done(plan: Plan) -> Iterator[str]:
    yield from ("## What was done", "")
    rows = [("operation", code(plan.operation))]
    if method := method_of(plan):
        name, summary, paper = method
        linked = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", cell(paper))
        rows += [("method", f"{code(name)}: {cell(summary)}"), ("paper", linked)]
    rows += [
        ("preservation", cell(str(plan.preservation))),
        ("plan digest", code(plan.digest())),
    ]
    yield from table(("", ""), rows)
    yield ""
    others = [note for note in plan.notes if note != UNTRAINED]
    yield from (f"- {cell(note)}" for note in others)
    yield from [""] if others else []


def _sources(plan: Plan, hashes: Mapping[str, str]) -> Iterator[str]:
    """Sources with digests; the files of checkpoints with hashes, where these are known."""
    yield from ("## Sources", "", "Digests are SHA-256 of config, tensor names, dtypes and shapes.")
    yield ""
    rows = []
    for source in leaves(plan):
        revision = source.revision if isinstance(source, Checkpoint) else None
        rows.append(
            (_linked(source), code(revision) if revision else "–", code(source.digest())),
        )
    yield from table(("source", "revision", "digest"), rows)
    yield ""
    if hashes:
        files = [(code(name), code(digest)) for name, digest in sorted(hashes.items())]
        yield from table(("file of weights", "SHA-256"), files)
        yield ""


def _options(plan: Plan) -> Iterator[str]:
    yield from ("## Options", "")
    yield from table(("option", "value"), [(code(k), _value(v)) for k, v in plan.options.items()])
    yield from ("", "```sh", repeat_line(plan), "```", "")


def _history(plan: Plan) -> Iterator[str]:
    """Operations before this one, oldest first; nothing where there were none."""
    earlier = history_of(plan)[:-1]
    if not earlier:
        return
    yield from ("## Earlier operations", "")
    for record in earlier:
        yield f"- {_record_line(record)}"
    yield ""


def _record_line(record: Mapping[str, Any]) -> str:
    """A record of the history, which anybody may have written, in one line."""
    sources = record.get("sources")
    found = sources if isinstance(sources, list) else []
    named = [s.get("label") for s in found if isinstance(s, dict)]
    preserved = record.get("preservation")
    kind = preserved.get("kind") if isinstance(preserved, dict) else None
    said = f"{code(str(record.get('operation')))} of {cell(', '.join(map(str, named)) or '?')}"
    return f"{said}, preservation {cell(str(kind))}, digest {code(str(record.get('plan_digest')))}"


def _model(plan: Plan, summary: PlanSummary) -> Iterator[str]:
    p = summary.parameters
    yield from ("## Parameters and memory", "")
    rows = [(n, f"{part.total:,}", f"{part.active:,}") for n, part in parts_of(p).items()]
    total = ("**all**", f"**{p.total:,}** ({count(p.total)})", f"**{p.active:,}**")
    yield from table(("part", "total", "active per token"), [*rows, total])
    yield from ("", f"Convention: {CONVENTION}.", "")
    if p.mtp:
        yield from (f"Multi-token prediction, outside these counts: {p.mtp:,}.", "")
    weights = ", ".join(f"{n} {bytes_text(size)}" for n, size in summary.memory.weights.items())
    yield from (f"On disk: {bytes_text(summary.bytes)} in {summary.tensors} tensors.", "")
    yield from (f"To serve (an estimate): {weights}{_cache(summary)}.", "")


def _cache(summary: PlanSummary) -> str:
    per_token, context = summary.memory.cache_per_token, summary.memory.context
    if per_token is None:
        return ""
    full = f" ({bytes_text(per_token * context)} at {context:,} tokens)" if context else ""
    return f"; and a bf16 key-value cache of {bytes_text(per_token)} per token{full}"


def _linked(source: Any) -> str:
    name = hub_id(source)
    label = cell(source.label)
    return f"[{label}](https://huggingface.co/{name})" if name else code(source.label)


def _value(value: Any) -> str:
    if value is None:
        return "by default"
    if isinstance(value, tuple | list):
        return ", ".join(code(str(v)) for v in value) or "none"
    return code(str(value))
