"""`moe-compose pack-expert`: one expert as a small checkpoint of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.composition.options import RoutingOptions

from ..output import out
from ..parameters import Json, Model, Output, Overwrite, Quiet
from ._routing import DEVICE, TEXT_TOKENS, Device, TextTokens, texts_by_name

if TYPE_CHECKING:
    from moe_compose.surgery.plan import Plan

Expert = Annotated[
    str | None,
    typer.Option("--expert", help="Of a mixture: which, by name or number.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Of a dense SOURCE: the model that it was trained from.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What the expert is called.", show_default=False),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Of a dense SOURCE: the MoE family that the expert is for; by default the most "
        "portable one.",
        show_default=False,
    ),
]
Text = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="FILE",
        help="Text of the expert, of which only statistics go along; again for more files.",
        show_default=False,
    ),
]


def pack_expert(
    source: Model,
    output: Output,
    expert: Expert = None,
    base: Base = None,
    name: Name = None,
    target: Target = None,
    data: Text = [],  # noqa: B006 - typer's way of saying "none"
    text_tokens: TextTokens = TEXT_TOKENS,
    device: Device = DEVICE,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack one expert, to be sent to somebody who has the base.

    The artifact holds its tensors, its router rows, statistics of its text if text is given, and a
    digest of the base, which add-expert --from and swap-expert --from check. It holds no text.
    """
    out.configure(as_json=as_json, quiet=quiet)
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.composition.pack import pack_expert

    begun = time.monotonic()
    texts = texts_by_name(data, "text").get("text")
    model = Checkpoint.open(source)
    with out.counting("measuring router inputs", "layers") as progress:
        plan = pack_expert(
            model,
            expert,
            base=None if base is None else Checkpoint.open(base),
            name=name,
            target=target,
            texts=texts,
            routing=RoutingOptions(tokens=text_tokens, device=device),
            progress=progress,
        )
    found = _write(plan, output, overwrite)
    out.result(found | {"seconds": round(time.monotonic() - begun, 3)}, str(output))


def _write(plan: Plan, output: Path, overwrite: bool) -> dict[str, object]:
    """Write the artifact, and say what it is."""
    from moe_compose.checkpoint import writer
    from moe_compose.composition.kept import STATS_PLACE
    from moe_compose.reporting.documents import encode
    from moe_compose.reporting.units import bytes_text

    documents = {name: encode(value) for name, value in plan.reports.items()}
    with out.progress(f"writing {output.name}") as progress:
        writer.write(plan, output, overwrite=overwrite, documents=documents, progress=progress)
    said = plan.reports["expert.json"]
    size = sum(t.nbytes for t in plan.tensors.values())
    stats = STATS_PLACE in plan.files
    out.show(
        f"Packed {said['name']} of {said['of']}: {len(plan.tensors)} tensors, {bytes_text(size)}, "
        f"{'with' if stats else 'without'} statistics of its text"
    )
    out.hint(
        f"Whoever has the base adds it with:\n  moe-compose add-expert MOE OUTPUT --from {output}"
    )
    return {**said, "output": str(output), "bytes": size, "statistics": stats}
