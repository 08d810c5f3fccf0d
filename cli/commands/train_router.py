"""`moe-compose train-router`: routers, alone or with experts, trained on text."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.training.options import TrainOptions

from ..output import out
from ..parameters import Domains, Moe, Output, Texts, with_options
from ..processes import joined, together
from ._refit import read_words
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.surgery.plan import Plan
    from moe_compose.training.loop import Progress

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="OTHER",
        help="The model that the result is to be like, such as the one before pruning: its "
        "predictions (--objective distill, whole in memory beside SOURCE) or each layer's output "
        "(--objective layer).",
        show_default=False,
    ),
]
EvalData = Annotated[
    list[str],
    typer.Option(
        "--eval-data",
        metavar="[NAME=]FILE",
        help="Held-out text, by domain or not; again for more. By default a part is split off.",
        show_default=False,
    ),
]
AdapterOut = Annotated[
    Path | None,
    typer.Option(
        "--adapter-out",
        metavar="FOLDER",
        help="Keep trained adapters (--train lora-...) in a new folder, as peft loads them on "
        "OUTPUT, which then has new routers only; by default they are merged.",
        show_default=False,
    ),
]


@with_writing(data=False)
@with_options(TrainOptions)
def train_router(
    source: Moe,
    output: Output,
    options: TrainOptions,
    how: How,
    teacher: Teacher = None,
    domains: Domains = [],  # noqa: B006 - typer's way of saying "none"
    data: Texts = [],  # noqa: B006
    eval_data: EvalData = [],  # noqa: B006
    adapter_out: AdapterOut = None,
) -> None:
    """Train the routers of a mixture of experts on text: alone, with some experts, or all of it.

    The model, and a teacher beside it, are whole in memory; with --objective layer, one layer of
    each. The best evaluation on held-out text is what is written, the start among them; figures are
    in training.json beside the result, a line a step in training.jsonl. What does not train keeps
    its bytes.

    Several devices: torchrun --nproc-per-node N -m moe_compose_cli train-router ... shares every
    step (pip install 'moe-compose[train]').
    """
    work = output.absolute().with_name(f"{output.name}.training")
    with joined() as first:
        if not first:
            out.configure(quiet=True)
        with together():  # what is wrong is said before torch is there
            texts, held = _texts(domains, data), read_words(eval_data)
            original, other = _open(source, teacher, how.dry_run)
            if adapter_out is not None:
                from moe_compose.training.setup import check_adapter_folder

                check_adapter_folder(adapter_out, options)
            if first and not how.dry_run:
                _clear(original, output, work, how)
        if how.dry_run:
            if first:
                _show_intent(original, texts, held, options, other)
            return
        plan = _train(original, texts, held, options, other, work, how.resume, adapter_out)
    if not first:
        return
    from ..training_screen import training_screen

    carry_out(source, output, how, lambda _: plan, training_screen)
    if adapter_out is not None:
        model = f"AutoModelForCausalLM.from_pretrained({str(output)!r})"
        out.hint(f"Adapters:\n  PeftModel.from_pretrained({model}, {str(adapter_out)!r})")
    _tidy(work)


def _texts(domains: list[str], data: list[str]) -> tuple[Domain, ...]:
    from moe_compose.calibration.data import read_texts

    return read_texts(*domains, *data)


def _open(
    source: str, teacher: str | None, headers_only: bool
) -> tuple[Checkpoint, Checkpoint | None]:
    from moe_compose.checkpoint.reader import Checkpoint

    original = Checkpoint.open(source, headers_only=headers_only)
    if teacher is None:
        return original, None
    return original, Checkpoint.open(teacher, headers_only=headers_only)


def _clear(original: Checkpoint, output: Path, work: Path, how: How) -> None:
    """Refuse a place that is taken before anything takes long; forget what shall not go on."""
    from moe_compose.reporting.publish import check_destination

    if how.resume:
        return
    check_destination(original, output, **how.where)
    if how.overwrite:
        shutil.rmtree(work, ignore_errors=True)


def _train(
    original: Checkpoint,
    texts: Sequence[Domain],
    held: Sequence[Domain] | None,
    options: TrainOptions,
    teacher: Checkpoint | None,
    work: Path,
    resume: bool,
    adapter_out: Path | None,
) -> Plan:
    from moe_compose.training.train import train_router as run

    from ..training_screen import evaluation_line

    out.interrupted = "States are kept: the same command with --resume continues."
    with out.counting(f"training {original.label}", "tokens") as count:

        def tell(p: Progress) -> None:
            if p.evaluated is not None:
                out.hint(evaluation_line(p.evaluated, p.best))
            elif count is not None:
                count(p.tokens, p.total)

        plan = run(
            original,
            texts,
            options,
            teacher=teacher,
            held_out=held,
            folder=work,
            resume=resume,
            adapter_out=adapter_out,
            progress=tell,
        )
    out.interrupted = ""
    return plan


def _show_intent(
    original: Checkpoint,
    texts: Sequence[Domain],
    held: Sequence[Domain] | None,
    options: TrainOptions,
    teacher: Checkpoint | None,
) -> None:
    """What would train, on what, and what it would take."""
    from dataclasses import asdict

    from moe_compose.training.setup import intent

    from ..training_screen import intent_screen

    with out.waiting("reading text"):
        found = intent(original, texts, held, options, teacher)
    out.show(intent_screen(original.label, found))
    out.hint("Dry run: nothing was trained or written.")
    out.result({"dry_run": True, **asdict(found)}, f"{found.trained}")


def _tidy(work: Path) -> None:
    """The result has it all but what TensorBoard shows."""
    from moe_compose.training.journal import BOARD

    if not (work / BOARD).is_dir():
        shutil.rmtree(work, ignore_errors=True)
        return
    for path in work.iterdir():
        if path.is_dir() and path.name != BOARD:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    out.hint(f"Curves:\n  tensorboard --logdir {work}")
