"""What every operation's command does with its plan: show it, write it, check it, compare it with
its source, keep what was found, and say what to do next.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..output import out

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_compose.checkpoint.destination import Destination
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.errors import MoeComposeError
    from moe_compose.surgery.plan import Plan
    from moe_compose.validation.report import ValidationReport


@dataclass(frozen=True, slots=True)
class How:
    """The flags that all operations share."""

    shard_size: int
    dry_run: bool
    resume: bool
    overwrite: bool
    validate: bool
    data: Path | None
    push_to_hub: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        """What cannot be pushed shall not come out after hours."""
        from moe_compose.errors import OptionError

        if self.push_to_hub is not None:
            from moe_compose.reporting.hub import check_repo

            check_repo(self.push_to_hub)
        elif self.private:
            raise OptionError("--private has no meaning without --push-to-hub ORG/NAME")

    @property
    def where(self) -> dict[str, Any]:
        """What writing takes."""
        return {
            "shard_size": self.shard_size,
            "resume": self.resume,
            "overwrite": self.overwrite,
        }


def carry_out(
    source: str,
    output: Path,
    how: How,
    make: Callable[[Checkpoint], Plan],
    more: Callable[[Plan], RenderableType] | None = None,
) -> None:
    """From a source to a written and validated result.

    Args:
        source: the checkpoint, as it was typed.
        output: folder of the result.
        how: the shared flags.
        make: the operation.
        more: a screen under that of the plan.
    """
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.reporting import publish

    from ..plan_screen import plan_screen

    begun = time.monotonic()
    _check_text(how.data)
    original = Checkpoint.open(source, headers_only=how.dry_run)
    plan = make(original)
    destination = publish.check_destination(plan, output, **how.where)
    out.show(plan_screen(plan, str(output)))
    if more is not None:
        out.show(more(plan))
    report = None
    if how.validate:
        _preflight(plan)
    if how.dry_run:
        _say_room(destination)
    else:
        written = _write(plan, output, how.where)
        if how.validate:
            report = _validate(written, _reference(plan, original), plan, how.data)
        _say_next(written, output, source, report)
    document = {"dry_run": how.dry_run, "seconds": round(time.monotonic() - begun, 3)}
    found = _document(plan, original, output, destination, report)
    failed = None
    if not how.dry_run and how.push_to_hub is not None:
        found["pushed"], failed = _push(written, report, how.push_to_hub, how.private)
    out.result(found | document, str(output))
    if failed is not None:
        out.error(failed)
        raise typer.Exit(failed.exit_code)
    if report is not None and not report.ok:
        raise typer.Exit(3)


def _check_text(data: Path | None) -> None:
    """What is wrong with the text shall not come out after hours of writing."""
    from moe_compose.validation.text import read_text

    if data is not None and not data.is_fifo():  # a pipe gives its text only once
        read_text(data)


def _push(
    written: Checkpoint, report: ValidationReport | None, repo: str, private: bool
) -> tuple[str | None, MoeComposeError | None]:
    """To the Hub, what is valid; the address, or why there is none: the result is told of all the
    same.
    """
    from moe_compose.errors import MoeComposeError
    from moe_compose.reporting.hub import push

    if report is not None and not report.ok:
        out.warn(f"{written.label} is not pushed to {repo}: it is not valid")
        return None, None
    with out.waiting(f"pushing {written.label} to {repo}"):
        try:
            url = push(written, repo, private=private)
        except MoeComposeError as error:
            return None, error
    out.hint(f"On the Hub: {url}")
    return url, None


def _preflight(plan: Plan) -> None:
    """A tensor too many or too few shall not come out after hours of writing either."""
    from moe_compose.validation import preflight

    with out.waiting("checking names and shapes against the target's class"):
        preflight(plan)


def _write(plan: Plan, output: Path, where: dict[str, Any]) -> Checkpoint:
    from moe_compose.reporting import publish

    how = "--resume instead of --overwrite" if where["overwrite"] else "--resume"
    out.interrupted = f"Finished shards are kept: the same command with {how} continues."
    with out.progress(f"writing {output.name}") as progress:
        return publish.write(plan, output, progress=progress, **where)


def _reference(plan: Plan, original: Checkpoint) -> Checkpoint:
    """What the plan's statement of how exact it is, is about."""
    from moe_compose.checkpoint.reader import Checkpoint

    found = plan.sources.get(plan.preservation.reference)
    return found if isinstance(found, Checkpoint) else original


def _validate(
    written: Checkpoint, original: Checkpoint, plan: Plan, data: Path | None
) -> ValidationReport:
    """Measure what was stated, keep it, and show it."""
    from moe_compose import validation
    from moe_compose.reporting.publish import record_validation

    from ..screens import report_screen

    here, there = shlex.quote(str(written.path)), shlex.quote(str(original.path))
    again = f"moe-compose validate {here} --against {there}"
    out.interrupted = f"The checkpoint is written, but not validated. Do that with:\n  {again}"
    with out.waiting(f"validating {written.label} against {original.label}"):
        report = validation.validate(
            written, against=original, preservation=plan.preservation, data=data
        )
        record_validation(written, plan, report)
    out.interrupted = ""
    out.show("")
    out.show(report_screen(report))
    return report


def _say_room(destination: Destination) -> None:
    """Bytes that would be written, and bytes that are free where they would go."""
    from moe_compose.reporting.units import bytes_text

    there = next(
        p for p in (destination.folder, *destination.folder.absolute().parents) if p.exists()
    )
    needed = sum(s.size for s in destination.shards if s.name not in destination.kept)
    free = shutil.disk_usage(there).free
    files = len(destination.shards) - len(destination.kept)
    out.hint(
        f"Dry run: nothing was written. It would take {bytes_text(needed)} in {files} "
        f"{'file' if files == 1 else 'files'} of weights; {bytes_text(free)} are free."
    )


def _say_next(
    written: Checkpoint, output: Path, source: str, report: ValidationReport | None
) -> None:
    """What to do with the result."""
    if report is not None and not report.ok:
        return
    if report is None:
        here, there = shlex.quote(str(output)), shlex.quote(source)
        out.hint(f"Not validated. Do that with:\n  moe-compose validate {here} --against {there}")
    if "tokenizer.json" in written.files or "tokenizer_config.json" in written.files:
        code = (
            f'from transformers import pipeline; p = pipeline("text-generation", '
            f"{json.dumps(str(output))}{_loading(written)}); "
            f'print(p("Once upon a time")[0]["generated_text"])'
        )
        out.hint(f"Generate text with:\n  python -c {shlex.quote(code)}")


def _loading(written: Checkpoint) -> str:
    """What transformers must be told to run widths that its default experts refuse."""
    from moe_compose.validation.profile import needs_eager_experts

    if not needs_eager_experts(written.config):
        return ""
    return ', model_kwargs={"experts_implementation": "eager"}'


def _document(
    plan: Plan,
    original: Checkpoint,
    output: Path,
    destination: Destination,
    report: ValidationReport | None,
) -> dict[str, Any]:
    from moe_compose.reporting.inspection import memory_json, parts_of

    summary = plan.summary()
    parameters = summary.parameters
    return {
        "output": str(output),
        "operation": plan.operation,
        "sources": [source.label for source in plan.sources.values()],
        "options": dict(plan.options),
        "plan_digest": plan.digest(),
        "preservation": asdict(plan.preservation),
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "by_part": {name: asdict(part) for name, part in parts_of(parameters).items()},
        },
        "bytes": summary.bytes,
        # where only headers were fetched, what will be copied is not known yet
        "copied_bytes": None if original.path is None else summary.copied_bytes,
        "weight_files": {shard.name: shard.size for shard in destination.shards},
        "memory": memory_json(summary.memory),
        "notes": list(plan.notes),
        **({"decided": dict(plan.decided)} if plan.decided else {}),
        "validation": report.to_json() if report else None,
    }
