"""`moe-compose train-router`: routers, alone or with experts, trained on text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_compose.recipe.state import State
from moe_compose.training.options import TrainOptions

from ..output import out
from ..parameters import Domains, Moe, Output, Texts, with_options
from ..processes import joined, together
from ._steps import Shown, given_of
from ._surgery import How, carry_out
from ._writing import with_writing

if TYPE_CHECKING:
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.recipe.acts import Training

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
    from moe_compose.recipe.acts import Training, trained

    work = output.absolute().with_name(f"{output.name}.training")
    given = given_of(
        "train-router",
        teacher=teacher,
        domain=domains,
        data=data,
        eval_data=eval_data,
        adapter_out=adapter_out,
    )
    state = State(dry=how.dry_run, resume=how.resume, watch=Shown(), folder=work)
    with joined() as first:
        if not first:
            out.configure(quiet=True)
        with together():  # what is wrong is said before torch is there
            job = Training.of(state, options, {"source": source, **given})
            if first and not how.dry_run:
                _clear(job.source, output, work, how)
        if how.dry_run:
            if first:
                _show_intent(job, options)
            return
        out.interrupted = "States are kept: the same command with --resume continues."
        plan = trained(state, options, job)
        out.interrupted = ""
    if not first:
        return
    from ..training_screen import training_screen

    carry_out(source, output, how, lambda _: plan, training_screen)
    if adapter_out is not None:
        model = f"AutoModelForCausalLM.from_pretrained({str(output)!r})"
        out.hint(f"Adapters:\n  PeftModel.from_pretrained({model}, {str(adapter_out)!r})")
    _tidy(work)


def _clear(original: TensorSource, output: Path, work: Path, how: How) -> None:
    """Refuse a place that is taken before anything takes long; forget what shall not go on."""
    from moe_compose.reporting.publish import check_destination

    if how.resume:
        return
    check_destination(original, output, **how.where)
    if how.overwrite:
        shutil.rmtree(work, ignore_errors=True)


def _show_intent(job: Training, options: TrainOptions) -> None:
    """What would train, on what, and what it would take."""
    from dataclasses import asdict

    from moe_compose.training.setup import intent

    from ..training_screen import intent_screen

    with out.waiting("reading text"):
        found = intent(job.source, job.texts, job.held, options, job.teacher)
    out.show(intent_screen(job.source.label, found))
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
