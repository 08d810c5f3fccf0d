"""Is a checkpoint whole, is it servable, and does it compute what its plan stated?

`validate` looks at structure (config, names, shapes, dtypes, tokenizer), at every value, at what
other engines need, and, given the source, runs both models on real text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import CheckpointError
from moe_compose.surgery.plan import Preservation
from moe_compose.validation.parity import compare, memory_available, memory_needed
from moe_compose.validation.profile import check_profile
from moe_compose.validation.report import Agreement, Check, Receipt, ValidationReport
from moe_compose.validation.structure import (
    build_on_meta,
    check_dtypes,
    check_names,
    load_tokenizer,
)
from moe_compose.validation.tensors import check_values
from moe_compose.validation.text import sequences

__all__ = ["Agreement", "Check", "Receipt", "ValidationReport", "validate"]

#: Where a checkpoint keeps the history of its surgery.
HISTORY = "moe_compose.json"

#: Longest sequence of the receipt, in tokens.
LONGEST = 256


def validate(
    checkpoint: Checkpoint,
    *,
    against: Checkpoint | None = None,
    preservation: Preservation | None = None,
    data: Path | None = None,
    tokens: int = 1024,
) -> ValidationReport:
    """Check a checkpoint, and with `against` compare it with its source on real text.

    Args:
        checkpoint: a local checkpoint.
        against: the checkpoint it was made from; without it there is no receipt.
        preservation: the class to hold the comparison to; by default the one in the checkpoint's
            own surgery history, or exact where there is none.
        data: text file for the comparison; by default a bundled sample of stories, prose, code,
            arithmetic and German.
        tokens: how many tokens to compare on.

    Returns:
        A report; `report.ok` is the verdict.

    Raises:
        CheckpointError: one of the two is not a local folder.
        OptionError: `data` is unreadable.
    """
    for c in (checkpoint, against):
        if c is not None and c.path is None:
            raise CheckpointError(
                f"{c.label} is not on this disk; validation reads every value",
                hint="Download it first, or give a folder.",
            )
    last = _last_surgery(checkpoint)
    model, config = build_on_meta(checkpoint)
    tokenizer, loads = load_tokenizer(checkpoint)
    checks = [config]
    if model is not None:
        checks.append(check_names(checkpoint, model))
    checks += [check_dtypes(checkpoint), loads]
    checks.append(check_values(checkpoint, last.get("constants", ()), against))
    checks += check_profile(checkpoint)
    receipt = None
    if against is not None:
        stated = preservation or _stated(last)
        broken = any(c.status == "fail" for c in checks)
        receipt, skipped = _receipt(checkpoint, against, stated, tokenizer, data, tokens, broken)
        checks += skipped
    return ValidationReport(
        checkpoint=checkpoint.label,
        checks=tuple(checks),
        receipt=receipt,
        versions=_versions(),
    )


def _receipt(
    checkpoint: Checkpoint,
    against: Checkpoint,
    stated: Preservation,
    tokenizer: Any,
    data: Path | None,
    tokens: int,
    broken: bool,
) -> tuple[Receipt | None, list[Check]]:
    """The comparison, or the reason why there is none."""
    if broken:
        return None, [Check("receipt", "skip", "not run on a checkpoint that fails other checks")]
    needed, available = memory_needed(checkpoint, against), memory_available()
    if available is not None and needed > available:
        text = (
            f"NOT MEASURED: comparing in fp32 takes about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free"
        )
        return None, [Check("receipt", "skip", text)]
    sizes = [c.config.get("vocab_size") for c in (checkpoint, against)]
    if sizes[0] != sizes[1] or not isinstance(sizes[0], int):
        text = f"the vocabularies differ ({sizes[1]} and {sizes[0]}): nothing to compare"
        return None, [Check("receipt", "fail", text)]
    longest = min(LONGEST, int(checkpoint.config.get("max_position_embeddings") or LONGEST))
    texts = sequences(tokenizer, data, tokens, longest, sizes[0])
    try:
        return compare(against, checkpoint, texts, stated), []
    except (RuntimeError, ValueError, OSError) as e:
        text = f"the models do not run: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        return None, [Check("receipt", "fail", text)]


def _last_surgery(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The last entry of the checkpoint's surgery history; empty when it has none."""
    path = checkpoint.files.get(HISTORY)
    if path is None:
        return {}
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        return dict(history[-1])
    except (OSError, ValueError, TypeError, IndexError, KeyError) as e:
        raise CheckpointError(
            f"{HISTORY} of {checkpoint.label} is not a list of records: {e}",
            hint="Remove the file to validate without it.",
        ) from e


def _stated(last: Mapping[str, Any]) -> Preservation:
    stated = last.get("preservation")
    if stated is not None:
        try:
            return Preservation(**stated)
        except TypeError as e:
            raise CheckpointError(
                f"{HISTORY} states no preservation class that this version knows: {e}"
            ) from e
    return Preservation("exact", "nothing else is stated, so the same function is expected")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("moe-compose", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
