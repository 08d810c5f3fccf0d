"""Writing a result together with what people need to trust it: the record of what was done, the
model card, and later what validation measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from moe_compose.checkpoint import writer
from moe_compose.checkpoint.copying import write_file
from moe_compose.checkpoint.destination import Destination
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.sharding import SHARD_SIZE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.checkpoint.write_state import STATE_NAME
from moe_compose.checkpoint.writer import Progress
from moe_compose.errors import CheckpointError, WriteError
from moe_compose.reporting import hashes
from moe_compose.reporting.card import model_card, with_hashes
from moe_compose.reporting.documents import (
    CARD_NAME,
    VALIDATION_NAME,
    encode,
    history_of,
    read_validation,
)
from moe_compose.reporting.hashes import Hashing, hashed_files, recorded
from moe_compose.reporting.receipt import renew
from moe_compose.surgery.history import HISTORY_NAME, read_history, read_json
from moe_compose.surgery.plan import Plan
from moe_compose.validation.report import ValidationReport


def write(
    source: TensorSource,
    folder: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Checkpoint:
    """Write a plan as a checkpoint, with its model card and the record of what was done.

    A source that is no plan, such as a `Checkpoint`, is written as it is, only sharded anew. The
    files of weights that a plan starts from are hashed meanwhile; record and card get the hashes
    when all else is written.

    Args:
        source: a plan, or any other source of tensors.
        folder: a new or empty folder, unless `resume` or `overwrite`.
        shard_size: bytes of tensors in one file.
        workers: threads; by default as many as there are processors, up to four.
        resume: continue what was begun with the same plan and shard size.
        overwrite: replace the checkpoint that is there.
        progress: called from this thread, about ten times a second.

    Returns:
        The written checkpoint.

    Raises:
        OptionError, PlanError, CheckpointError, WriteError: as `checkpoint.writer.write`.

    Example:
        >>> moe = write(upcycle(dense, UpcycleOptions()), "out/")  # doctest: +SKIP
    """
    with Hashing(hashed_files(source)) as hashing:
        if resume and isinstance(source, Plan):
            _refuse_other_weights(Path(folder).expanduser(), source, hashing)
        written = writer.write(
            _without_documents(source),
            folder,
            shard_size=shard_size,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            documents=documents(source),
        )
        if isinstance(source, Plan):
            _record_hashes(written, source, hashing)
    return written


def _refuse_other_weights(folder: Path, plan: Plan, hashing: Hashing) -> None:
    """A finished result of the same plan, but made from other weights, is not this write's.

    Digests do not tell: two fine-tunes of one model have the same config and headers.

    Raises:
        WriteError: so it is.
    """
    path = folder / HISTORY_NAME
    if not path.is_file() or (folder / STATE_NAME).exists():
        return  # an unfinished write knows its sources by size and time
    before = recorded(read_json(path, folder.name), plan)
    now = hashing.result() if before else {}
    changed = sorted(p.name for p, digest in before.items() if now.get(p, digest) != digest)
    if changed:
        raise WriteError(
            f"{folder}/ was made from other weights ({', '.join(changed[:3])} differ)",
            hint="Give another folder, or replace what is there with --overwrite.",
        )


def check_destination(
    source: TensorSource,
    folder: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
) -> Destination:
    """Refuse everything that `write` would refuse, without writing a byte; says what it would do.

    Args:
        source: as for `write`.
        folder: as for `write`.
        shard_size: as for `write`.
        resume: as for `write`.
        overwrite: as for `write`.

    Raises:
        OptionError, PlanError, CheckpointError, WriteError: as `checkpoint.writer.write`.
    """
    return writer.check_destination(
        _without_documents(source),
        folder,
        shard_size=shard_size,
        resume=resume,
        overwrite=overwrite,
    )


def documents(source: TensorSource) -> dict[str, bytes]:
    """The text files that come with a plan's result: name → content. None for other sources."""
    if not isinstance(source, Plan):
        return {}
    return {
        HISTORY_NAME: encode(history_of(source)),
        CARD_NAME: model_card(source, None).encode("utf-8", "replace"),
        **{name: encode(report) for name, report in source.reports.items()},
    }


def record_validation(
    checkpoint: Checkpoint, plan: Plan | None, report: ValidationReport
) -> Path | None:
    """Keep what was measured beside a checkpoint: `validation.json`, and the card renewed.

    A report that passes and compares with nothing does not replace one that holds a receipt: that
    would lose the stronger evidence.

    Args:
        checkpoint: a local one.
        plan: what it was written from: then the card is made anew, with the hashes of the sources'
            files that the record holds. Without it only the card's measured part changes, and only
            if moe-compose wrote that card.
        report: what was measured.

    Returns:
        The `validation.json`; None if the one that is there was kept.

    Raises:
        CheckpointError: the checkpoint is not on this machine.
        WriteError: its folder cannot be written to.
    """
    folder = checkpoint.path
    if folder is None:
        raise CheckpointError(f"{checkpoint.label} is not on this machine, so nothing is kept")
    if report.receipt is None and report.ok and _has_receipt(checkpoint):
        return None
    card = _card(checkpoint, folder, plan, report)
    write_file(folder / VALIDATION_NAME, encode(report.to_json()))
    if card is not None:
        write_file(folder / CARD_NAME, card.encode("utf-8", "replace"))
    return folder / VALIDATION_NAME


def _without_documents(source: TensorSource) -> TensorSource:
    """A plan that does not carry the source's card and history along, since it gets its own."""
    if not isinstance(source, Plan):
        return source
    own = (HISTORY_NAME, CARD_NAME, *source.reports)
    if not any(name in source.files for name in own):
        return source
    kept: Mapping[str, Path] = {n: p for n, p in source.files.items() if n not in own}
    return replace(source, files=kept)


def _has_receipt(checkpoint: Checkpoint) -> bool:
    try:
        found = read_validation(checkpoint)
    except CheckpointError:
        return False
    return found is not None and found.get("receipt") is not None


def _record_hashes(written: Checkpoint, plan: Plan, hashing: Hashing) -> None:
    """Add the hashes to record and card, each in one step, unless an earlier write did."""
    history, folder = read_history(written), written.path
    assert folder is not None
    ours = any(record.get("plan_digest") == plan.digest() for record in history)
    if not ours or hashes.recorded(history, plan).keys() >= set(hashed_files(plan)):
        return
    found = hashing.result()
    hashes.record(history, plan, found)
    write_file(folder / HISTORY_NAME, encode(history))
    path = folder / CARD_NAME
    if path.is_file():
        card = path.read_bytes().decode("utf-8", "replace")
        card = with_hashes(card, plan, hashes.by_name(plan, found))
        write_file(path, card.encode("utf-8", "replace"))


def _card(
    checkpoint: Checkpoint, folder: Path, plan: Plan | None, report: ValidationReport
) -> str | None:
    if plan is not None:
        known = hashes.recorded(read_history(checkpoint), plan)
        return model_card(plan, report, source_hashes=hashes.by_name(plan, known))
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    return renew(path.read_bytes().decode("utf-8", "replace"), report)
