"""`moe-compose tune`: which tiles are fastest on the accelerator that is here?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..output import out
from ..parameters import Json, Quiet

if TYPE_CHECKING:
    from moe_compose.kernels.tuned import Entry

#: Mixtral 8x7B, Qwen3-30B-A3B, OLMoE-1B-7B; DeepSeek-V3's layer alone is 23 GB.
SHAPES = ["4096,14336,8,2", "2048,768,128,8", "2048,1024,64,8"]

Shapes = Annotated[
    list[str],
    typer.Option(
        "--shape", metavar="D,F,E,K", help="Model width, expert width, experts, experts a token."
    ),
]
Tokens = Annotated[str, typer.Option("--tokens", metavar="T,...", help="Tokens of one call.")]
Device = Annotated[str, typer.Option("--device", metavar="TEXT", help="Where to run.")]
Repeat = Annotated[
    int, typer.Option("--repeat", min=1, metavar="INT", help="How often each is timed.")
]
File = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Keep what was found.", show_default=False),
]


def numbers(text: str) -> list[int]:
    """`1,64` → `[1, 64]`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers, such as 1,64,4096")
    return found


def layer_sizes(text: str) -> list[int]:
    """`2048,768,128,8` → D, F, E, K."""
    found = numbers(text)
    if len(found) != 4:
        raise typer.BadParameter(f"--shape {text!r} must be four numbers: D,F,E,K")
    return found


def tune(
    shape: Shapes = SHAPES,
    tokens: Tokens = "1,64,4096,16384",
    device: Device = "cuda",
    repeat: Repeat = 20,
    output: File = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest tiles of the MoE kernels on this GPU.

    Every candidate is compared with the reference before it is timed. Use the file with
    moe_compose.kernels.load_configs(FILE). Takes minutes per shape and number of tokens.
    """
    out.configure(as_json=as_json, quiet=quiet)
    sizes, counts = [layer_sizes(text) for text in shape], numbers(tokens)
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"--output: there is no folder {str(output.parent)!r}")
    import json

    import torch

    from moe_compose.kernels import tune as search
    from moe_compose.kernels.tuned import document

    from ..tune_screen import tune_screen

    where = torch.device(device)
    arch = search.check_device(where)
    if arch == "interpreter":
        out.warn("timings of Triton's interpreter mean nothing")
    entries: list[Entry] = []
    for model, width, experts, top_k in sizes:
        layer = search.Shape(model=model, width=width, experts=experts, top_k=top_k)
        for count in counts:
            with out.waiting(f"{model},{width},{experts},{top_k} with {count} tokens"):
                entries.append(search.tune(layer, count, where, repeats=repeat))
    found = document(entries, search.facts(where))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        out.hint(f"use it: moe_compose.kernels.load_configs({str(output)!r})")
    out.show(tune_screen(entries))
    out.result(found, str(output or "ok"))
