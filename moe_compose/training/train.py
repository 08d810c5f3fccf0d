"""`train_router`: train routers, alone or with experts; what changed replaces what was.

The model is whole in memory, frozen but for what trains, which the optimizer moves in fp32. A
teacher is whole in memory beside it: its logits for all the text would be larger. Evaluations are
of the weights as they will be stored, the best of them is what is returned, and the start is among
them: the result is never worse than the source on the held-out text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_compose.architectures import MoE
from moe_compose.calibration.texts import Texts as Given
from moe_compose.checkpoint.source import TensorSource
from moe_compose.runtime.whole import Whole
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.surgery.replace import Changed, ChangedWriter, replace_tensors
from moe_compose.surgery.selection import moe_form
from moe_compose.training.adapters import AdaptedMasters, targets_of
from moe_compose.training.batches import Texts
from moe_compose.training.chosen import Places, choose
from moe_compose.training.engine import Engine
from moe_compose.training.journal import JOURNAL, Journal
from moe_compose.training.labels import experts_of_domains
from moe_compose.training.layerwise import REPORT_NAME, train_layers
from moe_compose.training.loop import Loop, Progress
from moe_compose.training.masters import Masters
from moe_compose.training.measure import Forward
from moe_compose.training.objectives import Distill, NextToken, Objective, OwnDomain
from moe_compose.training.options import Balance, TrainOptions
from moe_compose.training.record import flags_of, job_of, tokens_in
from moe_compose.training.routers import Routers
from moe_compose.training.setup import (
    balance_of,
    check_adapter_folder,
    check_meant,
    dtype_of,
    texts_of,
)
from moe_compose.training.state import States


def train_router(
    source: TensorSource,
    texts: Given,
    options: TrainOptions | None = None,
    *,
    teacher: TensorSource | None = None,
    held_out: Given | None = None,
    folder: Path | None = None,
    resume: bool = False,
    adapter_out: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Train the routers of an MoE, alone or with more of it (METHODS section 8).

    Where torch.distributed is initialised (`torchrun`), all processes call this and get the same
    plan; accelerate, the extra `train`, is needed then.

    Args:
        source: a checkpoint, or a plan that was never written.
        texts: documents, by domain or not, or a `TokenSet`.
        options: see `TrainOptions`.
        teacher: for the objectives `distill`, whole in memory beside the source, and `layer`.
        held_out: text to evaluate on; None: some sequences of `texts` are split off.
        folder: for states to resume from, the journal, and the changed tensors, to be kept as long
            as the result is used; None: nothing is kept but the tensors, as long as the result is.
        resume: continue from the last state in `folder`: on a CPU with the same losses as without
            the interruption.
        adapter_out: a new folder for trained adapters, as peft loads them on the result, which then
            has new routers only; None: they are merged into the result.
        overwrite: replace adapters that are there.
        progress: told after every step and evaluation.

    Returns:
        A plan: the source with what trained replaced, the best evaluation's;
        `plan.reports["training.json"]` has the figures.

    Raises:
        OptionError: text or options that cannot be meant, a router without a gradient.
        UnsupportedError: quantised tensors that should train, a router that cannot be watched.
        WriteError: `folder` holds another run, or one that is not to be resumed.
        CheckpointError: the source computes no numbers.

    Example:
        >>> better = train_router(small, texts, TrainOptions(objective="distill"),
        ...                       teacher=moe)                         # doctest: +SKIP
        >>> better.reports["training.json"]["best"]                    # doctest: +SKIP
        {'step': 275, 'loss': 0.31}
    """
    options = options or TrainOptions()
    engine = Engine(options.device, shard=options.shard)
    with engine.ranks.together():
        _, moe = moe_form(source)
        check_meant(source, moe, options, teacher)
        if adapter_out is not None:
            check_adapter_folder(adapter_out, options, again=resume or overwrite)
        parts = texts_of(source, texts, held_out, options, teacher)
        if options.objective == "layer":
            assert teacher is not None
            return train_layers(source, parts, options, teacher, engine, folder, resume, progress)
        balance = balance_of(source, options)
        run = _Run(source, moe, parts, options, teacher, engine, balance, adapter_out)
        run.check_domains()
        run.load()
        states = States(folder, engine)
        state = states.begin(run.job(), resume=resume)
    return run.train(states, state, folder, progress)


@dataclass
class _Run:
    """One training."""

    source: TensorSource
    moe: MoE
    texts: Texts
    options: TrainOptions
    teacher: TensorSource | None
    engine: Engine
    balance: Balance
    adapter_out: Path | None = None

    def check_domains(self) -> None:
        """Which expert is whose, if that is what is trained; for held-out text too."""
        self.experts: Mapping[str, int] = {}
        if self.options.objective == "domain":
            domains = dict.fromkeys((*self.texts.tokens.domains, *self.texts.held.domains))
            self.experts = experts_of_domains(
                tuple(domains), self.source.config, self.moe.num_experts
            )

    def load(self) -> None:
        """The models, and copies of what trains."""
        form, moe = moe_form(self.source)
        dtype = dtype_of(self.source, self.options, self.engine.device.type)
        self.whole = Whole(self.source, dtype=dtype, device=self.engine.device)
        tensors = self.whole.tensors()
        places = Places(form, moe, self.whole.target_of, tensors)
        chosen = choose(places, self.options.parts, moe, tensors)
        wanted = self.balance == "bias"
        self.biases = dict(places.correction_biases()) if wanted else {}
        for name in chosen:
            tensors[name].requires_grad_(True)
        routers = Routers(self.whole.layers, moe)
        if self.options.checkpointing:
            routers.checkpoint(self.whole.layers)
        modules = [layer.module for layer in self.whole.layers]
        copied = (self.whole, chosen, tuple(self.biases.values()), self.engine)
        lora, merged = self.options.parts.lora, self.adapter_out is None
        self.masters: Masters
        if lora:
            targets = targets_of(self.whole, form, moe, lora)
            self.masters = AdaptedMasters(*copied, targets, self.options, merged=merged)
        self.forward = Forward(self.engine.prepare(self.whole.model, modules), routers)
        if not lora:
            self.masters = Masters(*copied)
        self.objective = self._objective(dtype)
        self.frozen = self.masters.frozen()

    def _objective(self, dtype: str) -> Objective:
        if self.options.objective == "lm":
            return NextToken()
        if self.options.objective == "domain":
            return OwnDomain(self.experts, self.moe.routing)
        assert self.teacher is not None
        return Distill(Whole(self.teacher, dtype=dtype, device=self.engine.device))

    def job(self) -> dict[str, Any]:
        """What a state belongs to."""
        frozen = sha256(repr(sorted(self.frozen.items())).encode()).hexdigest()
        more = {"frozen": self.engine.ranks.gather(frozen)[0], "balance": self.balance}
        return job_of(self.source, self.texts, self.options, self.teacher) | more

    def train(
        self,
        states: States,
        state: dict[str, Any] | None,
        folder: Path | None,
        progress: Callable[[Progress], None] | None,
    ) -> Plan:
        """All steps, and what they made of the source."""
        first = self.engine.rank == 0
        journal = Journal(folder if first else None, len(state["losses"]) if state else 0)
        self.loop = Loop(
            forward=self.forward,
            objective=self.objective,
            masters=self.masters,
            balance=self.balance,
            routing=self.moe.routing,
            biases=self.biases,
            texts=self.texts,
            options=self.options,
            engine=self.engine,
            states=states,
            journal=journal,
            progress=progress,
        )
        try:
            self.loop.run(state)
        finally:
            journal.close()
        self.masters.check_frozen(self.frozen)
        plan = self._plan(self._changed(None if folder is None else folder / "changed"))
        if folder is None:
            return plan
        return replace(plan, files={**plan.files, JOURNAL: folder / JOURNAL})

    def _changed(self, folder: Path | None) -> Changed:
        """The best values, as they are stored."""
        if self.adapter_out is not None and self.engine.rank == 0:
            assert isinstance(self.masters, AdaptedMasters)
            self.masters.save(self.adapter_out, self.loop.kept)
        values, rows = self.masters.collected(self.loop.kept)
        if folder is None or self.engine.rank == 0:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            writer = ChangedWriter(self.source.config, folder)
            try:
                for part in self.whole.stored(values, rows):
                    writer.add(part.tensors, part.rows)
                changed = writer.finish()
            except BaseException:
                writer.discard()
                raise
        self.engine.wait()
        if folder is not None:
            return Changed.open(folder)
        assert changed is not None
        return changed

    def _plan(self, changed: Changed) -> Plan:
        report = self._report()
        said = _summary(report)
        notes = [said]
        if self.adapter_out is not None:
            notes.append(f"needs the adapters in {self.adapter_out.name}, which it trained with")
        if report["stopped"] == "diverged":
            notes.append("the training diverged: a lower lr helps; the best weights were kept")
        return replace_tensors(
            self.source,
            changed,
            operation="train-router",
            preservation=Preservation("none", said),
            options=flags_of(self.texts, self.options, self.teacher),
            notes=tuple(notes),
            decided={"text": self.texts.tokens.digest(), "best": report["best"]},
            reports={REPORT_NAME: report},
        )

    def _report(self) -> dict[str, Any]:
        history, masters = self.loop.history, self.masters
        start, best = history.evaluations[0], history.evaluations[history.best]
        steps = len(history.losses)
        return {
            "loss": f"objective {self.options.objective}, nats per token",
            "options": {**asdict(self.options), "balance": self.balance},
            "teacher": None if self.teacher is None else self.teacher.label,
            "experts_of_domains": dict(self.experts),
            "tokens": tokens_in(self.texts),
            "trained": {"tensors": len(masters.each), "parameters": masters.parameters()},
            "frozen": {"tensors": len(self.frozen), "checked": "SHA-256 before and after"},
            "processes": self.engine.size,
            "sharded": self.engine.sharded,
            "start": {"step": 0, "loss": start.loss, "domains": start.domains},
            "best": {"step": best.step, "loss": best.loss, "domains": best.domains},
            "stopped": history.stopped,
            "steps": steps,
            "seconds": round(history.seconds, 3),
            "tokens_per_second": round(
                steps * self.options.batch_tokens / max(history.seconds, 1e-9)
            ),
            "losses": history.losses,
            "evaluations": [e.to_json() for e in history.evaluations],
        }


def _summary(report: Mapping[str, Any]) -> str:
    """One sentence."""
    before, best, what = report["start"]["loss"], report["best"], report["options"]
    head = f"{what['train']} trained for {report['steps']} steps ({what['objective']})"
    if not best["step"]:
        return f"{head}: no evaluation was better than the start, so nothing is changed"
    return (
        f"{head}: held-out loss {before:.4f} → {best['loss']:.4f} nats per token "
        f"(step {best['step']})"
    )
