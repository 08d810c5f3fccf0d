"""Is a checkpoint whole, is it servable, and does it compute what its plan stated?

`validate` looks at structure (config, names, shapes, dtypes, tokenizer), at every value, at what
other engines need; it runs an MoE's forward pass through the Triton kernels and through eager, and,
given the source, both models on real text; and, asked to, other engines beside transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, OptionError, PlanError
from moe_compose.surgery.history import HISTORY_NAME, read_history
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.validation import engines as other_engines
from moe_compose.validation import forward as forward_pass
from moe_compose.validation.forward_report import ForwardPass
from moe_compose.validation.memory import ShortageError
from moe_compose.validation.parity import compare
from moe_compose.validation.profile import check_profile
from moe_compose.validation.report import Agreement, Check, Receipt, Served, ValidationReport
from moe_compose.validation.structure import (
    build_on_meta,
    check_dtypes,
    check_names,
    check_routing,
    load_tokenizer,
)
from moe_compose.validation.tensors import check_copied, check_ties, check_values
from moe_compose.validation.text import Document, read_text, sequences
from moe_compose.version import versions

__all__ = ["Agreement", "Check", "Receipt", "Served", "ValidationReport", "preflight", "validate"]

#: Longest sequence of the receipt, in tokens.
LONGEST = 256

UNSOUND = "not run on a checkpoint that fails other checks"


def validate(
    checkpoint: TensorSource,
    *,
    against: TensorSource | None = None,
    preservation: Preservation | None = None,
    data: Path | None = None,
    tokens: int = 1024,
    forward_seconds: float | None = None,
    engines: Mapping[str, str | Path] | None = None,
) -> ValidationReport:
    """Check a checkpoint, and with `against` compare it with its source on real text.

    Args:
        checkpoint: a local checkpoint, or a plan that was not written yet: it is checked and
            compared in the same way, only not run through Triton.
        against: the checkpoint it was made from; without it there is no receipt.
        preservation: the class to hold the comparison to; by default the one in the checkpoint's
            own surgery history, or exact where there is none.
        data: text file for the comparison; by default a bundled sample of stories, prose, code,
            arithmetic and German.
        tokens: how many tokens to compare on.
        forward_seconds: what comparing an MoE's forward pass through Triton with eager may take on
            a machine without a GPU; 0: it is not compared; `forward.SECONDS` if not given.
        engines: engine (vllm, llama.cpp, mlx-lm, transformers-4) → a Python that can import it.
            These, and those that are installed here, are run beside transformers; None: none is.

    Returns:
        A report; `report.ok` is the verdict.

    Raises:
        CheckpointError: one of the two is not on this disk, or its history is damaged.
        OptionError: `data` is unreadable, there are too few tokens, or an engine cannot be run.
    """
    pythons = other_engines.pythons_of(engines or {})
    if tokens < 2:
        raise OptionError(f"a comparison needs at least 2 tokens ({tokens})")
    for source in (checkpoint, against):
        if isinstance(source, Checkpoint) and source.path is None:
            raise CheckpointError(
                f"{source.label} is not on this disk; validation reads every value",
                hint="Download it first, or give a folder.",
            )
    document = read_text(data)  # a pipe gives its text only once
    record = checkpoint.record() if isinstance(checkpoint, Plan) else _last(checkpoint)
    checks, tokenizer = _checks(checkpoint, against, record)
    if forward_seconds is None:
        forward_seconds = forward_pass.SECONDS
    sound = not any(c.status == "fail" for c in checks)
    receipt = forward = None
    if forward_pass.concerns(checkpoint):
        forward, more = _forward(checkpoint, tokenizer, document, forward_seconds, sound)
        checks += more
    if against is not None:
        stated = preservation or _stated(record)
        kept = _kept(record, against)
        receipt, more = _receipt(
            checkpoint, against, stated, tokenizer, document, tokens, sound, kept
        )
        checks += more
    served: tuple[Served, ...] = ()
    if engines is not None:
        served = _engines(checkpoint, tokenizer, document, pythons, sound)
    return ValidationReport(
        checkpoint=checkpoint.label,
        checks=tuple(checks),
        receipt=receipt,
        forward=forward,
        engines=served,
        versions=versions("moe-compose", "torch", "transformers", "safetensors"),
    )


def preflight(plan: Plan) -> None:
    """Hold a plan's names and shapes to its transformers class, before anything is written.

    Raises:
        PlanError: the class refuses the config, or a tensor is missing, unexpected or misshapen.
    """
    model, config = build_on_meta(plan)
    found = [config] if model is None else [config, check_names(plan, model)]
    problems = [
        f"{c.name}: {p}" for c in found if c.status == "fail" for p in c.problems or [c.detail]
    ]
    if problems:
        raise PlanError(
            "the result would not be a whole checkpoint of its class", problems=problems
        )


def _checks(
    checkpoint: TensorSource, against: TensorSource | None, record: Mapping[str, Any]
) -> tuple[list[Check], Any]:
    """Everything but the comparison; and the tokenizer, if there is one."""
    model, config = build_on_meta(checkpoint)
    tokenizer, loads = load_tokenizer(checkpoint, against)
    checks = [config]
    if model is not None:
        checks.append(check_names(checkpoint, model))
        checks += check_ties(checkpoint, getattr(model, "all_tied_weights_keys", None) or {})
    checks += [*check_routing(checkpoint), check_dtypes(checkpoint), loads]
    checks.append(check_values(checkpoint, record.get("constants", ()), against))
    if against is not None and record.get("copied"):
        checks.append(check_copied(checkpoint, record["copied"], against))
    return checks + check_profile(checkpoint), tokenizer


def _forward(
    checkpoint: TensorSource, tokenizer: Any, document: Document, seconds: float, sound: bool
) -> tuple[ForwardPass | None, list[Check]]:
    """The forward pass both ways, or the reason why there is none."""
    if not sound:
        return None, [Check("forward", "skip", UNSOUND)]
    if not isinstance(checkpoint, Checkpoint):
        text = "NOT MEASURED: a plan is run through Triton once it is written"
        return None, [Check("forward", "skip", text)]
    vocabulary = checkpoint.config.get("vocab_size")
    if not isinstance(vocabulary, int):
        return None, [Check("forward", "skip", "NOT MEASURED: the config tells no vocab_size")]
    padding = checkpoint.config.get("pad_token_id")
    texts = sequences(
        tokenizer, document, forward_pass.TOKENS, forward_pass.LONGEST, vocabulary, padding
    )
    forward, check = forward_pass.forward(checkpoint, texts, seconds=seconds)
    return forward, [check]


def _engines(
    checkpoint: TensorSource,
    tokenizer: Any,
    document: Document,
    pythons: Mapping[str, Path],
    sound: bool,
) -> tuple[Served, ...]:
    """What other engines make of a checkpoint, on prompts from the same text."""
    vocabulary, padding = (checkpoint.config.get(k) for k in ("vocab_size", "pad_token_id"))
    texts = None
    if sound and isinstance(vocabulary, int):
        tokens, longest = other_engines.TOKENS, other_engines.LONGEST
        texts = sequences(tokenizer, document, tokens, longest, vocabulary, padding)
    why_not = "" if sound else UNSOUND
    return other_engines.check_engines(checkpoint, texts, pythons, why_not)


def _receipt(
    checkpoint: TensorSource,
    against: TensorSource,
    stated: Preservation,
    tokenizer: Any,
    document: Document,
    tokens: int,
    sound: bool,
    kept: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Receipt | None, list[Check]]:
    """The comparison, or the reason why there is none."""
    if not sound:
        return None, [Check("receipt", "skip", UNSOUND)]
    config = checkpoint.config
    vocabulary, other = config.get("vocab_size"), against.config.get("vocab_size")
    if vocabulary != other or not isinstance(vocabulary, int):
        text = f"the vocabularies differ ({other} and {vocabulary}): nothing to compare"
        return None, [Check("receipt", "fail", text)]
    longest = min(LONGEST, int(config.get("max_position_embeddings") or LONGEST))
    padding = config.get("pad_token_id")
    texts = sequences(tokenizer, document, tokens, longest, vocabulary, padding)
    try:
        return compare(against, checkpoint, texts, stated, kept), []
    except ShortageError as e:
        return None, [Check("receipt", "skip", f"NOT MEASURED: {e}")]
    except Exception as e:  # whatever a model class raises, the finding is the same
        text = f"the models do not run: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        return None, [Check("receipt", "fail", text)]


def _last(checkpoint: TensorSource) -> Mapping[str, Any]:
    """The last record of the checkpoint's surgery history; empty when it has none."""
    history = read_history(checkpoint)
    return history[-1] if history else {}


def _stated(record: Mapping[str, Any]) -> Preservation:
    stated = record.get("preservation")
    if stated is None:
        return Preservation("exact", "nothing else is stated, so the same function is expected")
    try:
        return Preservation.from_json(stated)
    except TypeError as e:
        raise CheckpointError(
            f"{HISTORY_NAME} states no preservation class that this version knows: {e}",
            hint="Remove the file to validate without it.",
        ) from e


def _kept(record: Mapping[str, Any], against: TensorSource) -> dict[int, list[int]] | None:
    """Layer → experts, if the record is of a pruning of just this source; nobody vouches for it."""
    decided, sources = record.get("decided"), record.get("sources")
    kept = decided.get("kept") if isinstance(decided, Mapping) else None
    if record.get("operation") not in ("prune", "remove-expert") or not isinstance(kept, Mapping):
        return None
    if not isinstance(sources, list) or not sources or not isinstance(sources[0], Mapping):
        return None
    if sources[0].get("digest") != against.digest():
        return None
    try:
        return {int(layer): [int(e) for e in ids] for layer, ids in kept.items()}
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{HISTORY_NAME} names kept experts that are no numbers") from e
