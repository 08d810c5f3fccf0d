"""`moe-compose validate`: is a checkpoint whole, servable, and what its history states?"""

from __future__ import annotations

from typing import Annotated

import typer

from ..output import out
from ..parameters import Data, Json, Quiet

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


def validate(
    path: Folder,
    against: Against = None,
    data: Data = None,
    tokens: Tokens = 1024,
    forward_seconds: Forward = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint, and compare it with its source.

    Structure, values and portability are checked; the forward pass of an MoE is run through Triton
    kernels and through eager, both against fp64; with --against SOURCE both models are run on text
    and their logits compared. The findings are kept as validation.json beside it. Exit code
    3: it is not valid, or not as exact as the last operation on it stated.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose import validation
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.errors import WriteError
    from moe_compose.reporting.publish import record_validation

    from ..screens import report_screen

    checkpoint = Checkpoint.open(path)
    source = Checkpoint.open(against) if against is not None else None
    with out.waiting(f"validating {checkpoint.label}"):
        report = validation.validate(
            checkpoint, against=source, data=data, tokens=tokens, forward_seconds=forward_seconds
        )
    out.show(report_screen(report))
    out.result(report.to_json(), "ok" if report.ok else "not ok")
    if checkpoint.revision is None:  # the Hub's cache is nobody's to write into
        try:
            kept = record_validation(checkpoint, None, report)
        except WriteError as e:
            out.warn(f"{e.message}: the findings are not kept")
        else:
            if kept is None:
                out.hint(
                    "validation.json holds a comparison with the source and is kept; "
                    "renew it with --against SOURCE."
                )
    if not report.ok:
        raise typer.Exit(3)
