"""`moe-compose compose`: several models become one mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_compose.surgery.compose_options import ComposeOptions

from ..parameters import Output, with_options
from ._routing import DEVICE, TEXT_TOKENS, Device, ExpertTexts, RowScale, TextTokens
from ._steps import given_of, step
from ._surgery import How, carry_out
from ._writing import with_writing

Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="A dense checkpoint: family, config, tokenizer, and expert 0.",
        show_default=False,
    ),
]
Experts = Annotated[
    list[str],
    typer.Option(
        "--expert",
        metavar="NAME=MODEL",
        help="An expert and where it comes from: a dense model, an anchored pair, MOE#3, or "
        "MODEL+ADAPTER with a LoRA folder; again for more.",
        show_default=False,
    ),
]
FromMergekit = Annotated[
    Path | None,
    typer.Option(
        "--from-mergekit",
        metavar="FILE",
        help="A config of mergekit-moe, instead of --base and --expert; flags win over it.",
        show_default=False,
    ),
]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        "--embeddings",
        metavar="FILE",
        help="For router domain: safetensors with one embedding, or rows of them, per expert name.",
        show_default=False,
    ),
]


@with_writing(data=False)
@with_options(ComposeOptions)
def compose(
    output: Output,
    options: ComposeOptions,
    how: How,
    base: Base = None,
    expert: Experts = [],  # noqa: B006 - typer's way of saying "none"
    from_mergekit: FromMergekit = None,
    data: ExpertTexts = [],  # noqa: B006
    text_tokens: TextTokens = TEXT_TOKENS,
    row_scale: RowScale = None,
    device: Device = DEVICE,
    embeddings: Embeddings = None,
) -> None:
    """Compose independently trained models into one mixture of experts.

    Everything that does not fit is named before any work. With text of the experts, router rows
    follow from it without training, and statistics are kept beside the result, so that experts can
    be added later without that text. Exit code 3: written, but not what was stated.
    """
    from moe_compose.recipe.acts import origin_of

    given = given_of(
        "compose",
        base=base,
        expert=expert,
        from_mergekit=from_mergekit,
        data=data,
        text_tokens=text_tokens,
        row_scale=row_scale,
        device=device,
        embeddings=embeddings,
    )
    origin = origin_of(options, given)
    carry_out(origin, output, how, step("compose", options, given, how))
