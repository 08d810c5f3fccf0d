"""`moe-compose compose`: several models become one mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.composition.options import RoutingOptions
from moe_compose.surgery.compose_options import ComposeOptions

from ..output import out
from ..parameters import Output, with_options
from ._routing import (
    DEVICE,
    TEXT_TOKENS,
    Device,
    ExpertTexts,
    RowScale,
    TextTokens,
    texts_by_name,
)
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from torch import Tensor

    from moe_compose.calibration.texts import Texts
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.surgery.donors import Donor
    from moe_compose.surgery.plan import Plan

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
    texts: Mapping[str, Texts] = texts_by_name(data, None)
    if from_mergekit is None:
        origin, words = _base_of(base, expert), expert
    else:
        origin, words, options, prompts = _mergekit(from_mergekit, base, expert, options)
        if row_scale is None and prompts and not texts:
            row_scale = 1.0  # prompts are too short to hold some of them out
        texts = {**prompts, **texts}
    donors = donors_of(words, how.dry_run)
    routing = RoutingOptions(
        tokens=text_tokens, row_scale=row_scale, device=device, seed=options.seed
    )

    def make(original: Checkpoint) -> Plan:
        from moe_compose.composition.compose import compose

        if how.dry_run:
            return _unmeasured(original, donors, options, text=bool(texts))
        with out.counting("measuring router inputs", "layers") as progress:
            return compose(
                original,
                donors,
                options,
                texts,
                routing=routing,
                embeddings=_embeddings(embeddings),
                progress=progress,
            )

    carry_out(origin, output, how, make)


def _base_of(base: str | None, expert: list[str]) -> str:
    from moe_compose.errors import OptionError

    if base is None or not expert:
        given = {"--base MODEL": base, "--expert NAME=MODEL": expert}
        missing = " and ".join(flag for flag, value in given.items() if not value)
        raise OptionError(
            f"nothing says what is composed: {missing} must be given",
            hint="A config of mergekit-moe does as well: --from-mergekit FILE.",
        )
    return base


def _mergekit(
    path: Path, base: str | None, expert: list[str], options: ComposeOptions
) -> tuple[str, list[str], ComposeOptions, dict[str, Texts]]:
    """Base, experts, options and prompts of a config; options that were given win over its own."""
    from moe_compose.errors import OptionError
    from moe_compose.surgery.mergekit import read_mergekit

    if base is not None or expert:
        raise OptionError("--from-mergekit says what is composed: leave out --base and --expert")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as e:
        raise OptionError(f"cannot read --from-mergekit {path}: {e}") from e
    config, plain = read_mergekit(text, path.name), ComposeOptions()
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    changed = {n: v for n, v in given.items() if v != getattr(plain, n)}
    words = [f"{name}={model}" for name, model in config.experts.items()]
    return config.base, words, replace(config.options, **changed), dict(config.texts)


def donors_of(words: list[str], headers_only: bool) -> dict[str, Donor]:
    """`NAME=MODEL` as name → donor, opened; all that is wrong at once."""
    from functools import partial

    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.errors import OptionError
    from moe_compose.surgery.donors import Donor

    found, problems = {}, []
    for word in words:
        name, equals, model = word.partition("=")
        if not equals or not name or not model:
            problems.append(f"--expert {word}: it must be NAME=MODEL, such as math=models/math")
        elif name in found:
            problems.append(f"--expert {word}: there is a {name!r} already")
        else:
            opener = partial(Checkpoint.open, headers_only=headers_only)
            found[name] = Donor.parse(model, opener)
    if problems:
        raise OptionError("these are no experts", problems=problems)
    return found


def _unmeasured(
    base: Checkpoint, donors: dict[str, Donor], options: ComposeOptions, *, text: bool
) -> Plan:
    """The plan with rows of zeros: names and sizes are the same."""
    from moe_compose.surgery.compose import plan_composition
    from moe_compose.surgery.members import all_pairs

    settled = options.settled(text=text, pairs=all_pairs(list(donors.values())))
    if settled.shared == "best":
        settled = replace(settled, shared="mean")
    if text:
        out.hint("Dry run: nothing is measured on text; names and sizes are the same.")
    return plan_composition(base, donors, settled)


def _embeddings(path: Path | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from moe_compose.errors import OptionError

    if path is None:
        return {}
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as e:
        raise OptionError(f"--embeddings ({path}) is no safetensors file: {e}") from e
