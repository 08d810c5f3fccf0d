"""`moe-compose evaluate`: held-out loss of a checkpoint, and its distance to another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.evaluation.options import EvaluateOptions

from ..output import out
from ..parameters import Domains, Json, Model, Quiet, Texts, with_options

if TYPE_CHECKING:
    from moe_compose.evaluation.result import Evaluation

Against = Annotated[
    str | None,
    typer.Option("--against", metavar="OTHER", help="A reference to compare with."),
]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE.json",
        help="Keep the figures here, and finished rounds meanwhile beside it.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the finished rounds beside --out.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")]


@with_options(EvaluateOptions)
def evaluate(
    source: Model,
    options: EvaluateOptions,
    against: Against = None,
    domains: Domains = [],  # noqa: B006 - typer's way of saying "none"
    data: Texts = [],  # noqa: B006
    out_file: OutFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure held-out loss by domain, and the distance to another checkpoint.

    The model is streamed a layer at a time, so it may be far larger than memory. With --against
    both run side by side: KL, overlap and top-1 agreement of their predictions, how far each
    layer's output is off, and where greedy decoding parts ways. Exit code 3: the loss is not
    finite.
    """
    out.configure(as_json=as_json, quiet=quiet)
    found = _evaluate(source, options, against, domains, data, out_file, resume, overwrite)
    from ..evaluation_screen import evaluation_screen

    out.show(evaluation_screen(found))
    line = f"{found.overall.loss:.6f}"
    out.result(found.to_json(), line if found.overall.kl is None else f"{found.overall.kl:.6e}")
    if not found.finite:
        out.warn("the loss is not finite: a weight is NaN or infinite, or overflows in this dtype")
        raise typer.Exit(3)


def _evaluate(
    source: str,
    options: EvaluateOptions,
    against: str | None,
    domains: list[str],
    data: list[str],
    out_file: Path | None,
    resume: bool,
    overwrite: bool,
) -> Evaluation:
    from moe_compose.calibration.data import parse_domains, read_domains
    from moe_compose.checkpoint.copying import write_file
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.errors import OptionError
    from moe_compose.evaluation.measure import evaluate as run
    from moe_compose.reporting.documents import encode

    if resume and out_file is None:
        raise OptionError("--resume needs --out", hint="Finished rounds are kept beside that file.")
    _check_place(out_file, overwrite)
    keep = None if out_file is None else out_file.with_name(f"{out_file.name}.partial")
    texts = read_domains(parse_domains(domains, data))
    checkpoint = Checkpoint.open(source)
    reference = None if against is None else Checkpoint.open(against)
    if keep is not None:
        out.interrupted = "Finished rounds are kept: the same command with --resume continues."
    beside = "" if reference is None else f" beside {reference.label}"
    with out.counting(f"evaluating {checkpoint.label}{beside}", "tokens") as progress:
        found = run(
            checkpoint,
            texts,
            against=reference,
            options=options,
            keep=keep,
            resume=resume,
            progress=progress,
        )
    out.interrupted = ""
    if out_file is not None:
        write_file(out_file, encode(found.to_json()))
    return found


def _check_place(out_file: Path | None, overwrite: bool) -> None:
    """Whether the figures may be written there; asked before anything takes long."""
    from moe_compose.errors import OptionError

    if out_file is None:
        return
    if not out_file.name or out_file.is_dir():
        raise OptionError(f"--out ({out_file}) is a folder", hint="Name a file: figures.json.")
    if not out_file.absolute().parent.is_dir():
        raise OptionError(f"--out ({out_file}) lies in a folder that does not exist")
    if out_file.exists() and not overwrite:
        raise OptionError(f"--out ({out_file}) is there", hint="Replace it with --overwrite.")
