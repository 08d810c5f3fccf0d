"""`moe-compose upcycle`: a dense checkpoint becomes a mixture of experts."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_compose.checkpoint.writer import SHARD_SIZE
from moe_compose.surgery.upcycle_options import UpcycleOptions

from ..output import out
from ..parameters import (
    Data,
    DryRun,
    Json,
    Output,
    Overwrite,
    Quiet,
    Resume,
    ShardSize,
    Validate,
    with_options,
)
from ._surgery import How, carry_out

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A dense checkpoint: a folder, or org/name@revision."),
]


@with_options(UpcycleOptions)
def upcycle(
    source: Source,
    output: Output,
    options: UpcycleOptions,
    shard_size: ShardSize = SHARD_SIZE,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    validate: Validate = True,
    data: Data = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a mixture of experts from a dense checkpoint.

    What the result will be, and how exact, is shown first; then it is written, checked, and
    compared with its source on real text. Exit code 3: written, but not what was stated.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.surgery.upcycle import upcycle

    how = How(shard_size, dry_run, resume, overwrite, validate, data)
    carry_out(source, output, how, lambda dense: upcycle(dense, options))
