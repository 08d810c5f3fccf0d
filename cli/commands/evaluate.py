"""`moe-compose evaluate`: held-out loss of a checkpoint, and its distance to another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.evaluation.options import EvaluateOptions

from ..output import out
from ..parameters import Domains, Json, Model, Quiet, Texts, with_options
from ._recipe import with_recipe
from ._steps import find, given_of

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


@with_recipe
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
    from moe_compose.errors import OptionError

    if resume and out_file is None:
        raise OptionError("--resume needs --out", hint="Finished rounds are kept beside that file.")
    given = given_of("evaluate", against=against, domain=domains, data=data, out=out_file)
    if out_file is not None:
        out.interrupted = "Finished rounds are kept: the same command with --resume continues."
    found: Evaluation = find("evaluate", source, options, given, resume=resume, overwrite=overwrite)
    out.interrupted = ""
    from ..evaluation_screen import evaluation_screen

    out.show(evaluation_screen(found))
    line = f"{found.overall.loss:.6f}"
    out.result(found.to_json(), line if found.overall.kl is None else f"{found.overall.kl:.6e}")
    if not found.finite:
        out.warn("the loss is not finite: a weight is NaN or infinite, or overflows in this dtype")
        raise typer.Exit(3)
