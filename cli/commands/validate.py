"""`moe-compose validate`: is a checkpoint whole, servable, and what its history states?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..output import out
from ..parameters import Data, Json, Quiet

if TYPE_CHECKING:
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.validation.report import ValidationReport

Folder = Annotated[
    str, typer.Argument(metavar="PATH", help="The checkpoint's folder, or its name on the Hub.")
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="SOURCE",
        help="What it was made from: both are run on text and compared.",
        show_default=False,
    ),
]
Tokens = Annotated[
    int, typer.Option("--tokens", min=2, metavar="INT", help="Tokens to compare on.")
]
Forward = Annotated[
    float | None,
    typer.Option(
        "--forward-seconds",
        min=0,
        metavar="SECONDS",
        help="Time for the forward pass through Triton without a GPU (default 60; 0: not run).",
        show_default=False,
    ),
]
Engines = Annotated[
    bool,
    typer.Option(
        "--engines", help="Run other engines that are installed, and say what is known of the rest."
    ),
]
EnginePython = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-python",
        metavar="ENGINE=PYTHON",
        help="A Python that can import vllm, llama.cpp, mlx-lm, or transformers-4 (repeatable).",
        show_default=False,
    ),
]


def validate(
    path: Folder,
    against: Against = None,
    data: Data = None,
    tokens: Tokens = 1024,
    forward_seconds: Forward = None,
    engines: Engines = False,
    engine_python: EnginePython = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint, and compare it with its source.

    Structure, values and portability are checked; the forward pass of an MoE is run through Triton
    kernels and through eager, both against fp64; with --against SOURCE both models are run on text
    and their logits compared; with --engines other engines go on from prompts, greedily. Beside a
    checkpoint that moe-compose wrote the findings are kept, as validation.json. Exit code 3: it is
    not valid, not as exact as the last operation on it stated, or not the same in an engine that
    --engine-python names.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose import validation
    from moe_compose.checkpoint.reader import Checkpoint

    from ..engines_screen import engines_screen
    from ..screens import report_screen

    checkpoint = Checkpoint.open(path)
    source = Checkpoint.open(against) if against is not None else None
    with out.waiting(f"validating {checkpoint.label}"):
        report = validation.validate(
            checkpoint,
            against=source,
            data=data,
            tokens=tokens,
            forward_seconds=forward_seconds,
            engines=_pythons(engine_python or []) if engines or engine_python else None,
        )
    if report.engines:
        out.show(engines_screen(report))
    out.show(report_screen(report))
    out.result(report.to_json(), "ok" if report.ok else "not ok")
    _keep(checkpoint, report)
    if not report.ok:
        raise typer.Exit(3)


def _keep(checkpoint: Checkpoint, report: ValidationReport) -> None:
    """Beside the weights, if that is ours to write into: no cache, and nobody else's model."""
    from moe_compose.errors import WriteError
    from moe_compose.reporting.publish import record_validation
    from moe_compose.surgery.history import HISTORY_NAME

    folder = checkpoint.path
    if folder is None or checkpoint.revision is not None or not (folder / HISTORY_NAME).is_file():
        return
    try:
        kept = record_validation(checkpoint, None, report)
    except WriteError as e:
        out.warn(f"{e.message}: the findings are not kept")
        return
    if kept is None:
        out.hint(
            "validation.json holds a comparison with the source and is kept; "
            "renew it with --against SOURCE."
        )


def _pythons(given: list[str]) -> dict[str, str]:
    """ENGINE=PYTHON, as a mapping."""
    wrong = [text for text in given if not all(text.partition("="))]
    if wrong:
        raise typer.BadParameter(
            f"{', '.join(wrong)}: write ENGINE=PYTHON", param_hint="--engine-python"
        )
    return {name: python for name, _, python in (text.partition("=") for text in given)}
