"""The objective `layer`: every layer's router trained to bring back what its FFN returned in the
original; for models that fit into no memory.

Original and result run in lockstep, a layer of each in memory. The original sees its own hidden
states, the result those that its trained layers before have made: so a router also makes up for
what is lost already. In memory are the original's hidden states, and what a layer's FFN is given
and should return until its router is trained: tokens × D numbers, three times. The original may be
dense: then its FFN is what experts were made of.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.runtime import Layer
from moe_compose.runtime.lockstep import Call
from moe_compose.runtime.single import filled
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.surgery.replace import Changed, ChangedWriter, replace_tensors
from moe_compose.surgery.selection import moe_form
from moe_compose.training.batches import Texts
from moe_compose.training.chosen import Places
from moe_compose.training.engine import Engine
from moe_compose.training.ffn import Passage, Streamed, first, hooked
from moe_compose.training.journal import JOURNAL, Journal
from moe_compose.training.loop import Progress
from moe_compose.training.masters import Masters
from moe_compose.training.one_layer import Trained, train_layer
from moe_compose.training.options import TrainOptions
from moe_compose.training.record import flags_of, job_of, tokens_in
from moe_compose.training.routers import Routers
from moe_compose.training.state import States

#: What was trained and what it brought, beside the result.
REPORT_NAME = "training.json"


def train_layers(
    source: TensorSource,
    texts: Texts,
    options: TrainOptions,
    teacher: TensorSource,
    engine: Engine,
    folder: Path | None,
    resume: bool,
    progress: Callable[[Progress], None] | None,
) -> Plan:
    """Train the routers layer by layer (METHODS section 7); `train_router` calls it.

    Args:
        source: an MoE.
        texts: what is trained on, and held out.
        options: see `TrainOptions`.
        teacher: the original, with as many layers.
        engine: one process.
        folder: for finished layers, the journal and the changed tensors; None: none are kept.
        resume: go on after the last finished layer in `folder`.
        progress: told after every step.

    Raises:
        OptionError: models that do not belong together, several processes.
        UnsupportedError: an FFN that is given more than hidden states, or is no module.
    """
    if engine.size > 1:
        raise OptionError(f"the objective layer runs in one process (not {engine.size})")
    states = States(folder, engine)
    state = states.begin(job_of(source, texts, options, teacher), resume=resume)
    done = dict(state["layers"]) if state else {}
    journal = Journal(folder, len(done) * options.steps)
    place = None if folder is None else folder / "changed"
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)
    writer = ChangedWriter(source.config, place)
    run = _Run(source, teacher, texts, options, engine, writer, states, done, journal, progress)
    try:
        run.through()
        changed = writer.finish()
    except BaseException:
        writer.discard()
        raise
    finally:
        journal.close()
    assert changed is not None
    plan = _plan(source, changed, texts, options, teacher, run.found)
    return (
        plan if folder is None else replace(plan, files={**plan.files, JOURNAL: folder / JOURNAL})
    )


class _Run:
    """All layers, one after another."""

    def __init__(
        self,
        source: TensorSource,
        teacher: TensorSource,
        texts: Texts,
        options: TrainOptions,
        engine: Engine,
        writer: ChangedWriter,
        states: States,
        done: dict[str, Any],
        journal: Journal,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._form, self._moe = moe_form(source)
        self._options, self._engine, self._writer = options, engine, writer
        self._kept, self._done, self._journal, self._progress = states, done, journal, progress
        self._models = [Streamed(x, options, engine) for x in (teacher, source, source)]
        hashed = self._moe.routing.hashed_layers
        self._layers = tuple(i for i in self._moe.sparse_layers if i >= hashed)
        tokens = _together(texts)
        self._rows = tokens.batches(options.batch)
        self._real = [r.real.flatten().to(engine.device) for r in self._rows]
        fitted = len(texts.fitted)
        parts = [(r.sequence_B >= fitted)[:, None].expand_as(r.batch.ids) for r in self._rows]
        held = [p.flatten().to(engine.device) for p in parts]
        self._held_T = torch.cat([h[real_T] for h, real_T in zip(held, self._real, strict=True)])
        self._states: dict[int, Tensor] = {}
        self.found = {int(i): Trained.from_json(x["found"]) for i, x in done.items()}

    def through(self) -> None:
        """Run the text through both.

        Raises:
            OptionError: models of other depths.
        """
        original, _, result = (m.runner for m in self._models)
        if len(original.layers) != len(result.layers):
            counts = f"{len(original.layers)} and {len(result.layers)}"
            raise OptionError(f"original and result must have the same layers ({counts})")
        result.run([r.batch for r in self._rows], on_layer=self._put, ahead=self._ahead)

    def _ahead(self, index: int, calls: Iterator[tuple[int, Call]]) -> None:
        """Before the result's layer is there: the original's on its own hidden states, and a copy
        of ours, to be trained, on what ours will be given.
        """
        original, copy, _ = self._models
        wanted = index in self._layers and str(index) not in self._done
        with ExitStack() as stack:
            theirs = stack.enter_context(filled(original.runner, index))
            passage = None
            if wanted:
                ours = stack.enter_context(filled(copy.runner, index))
                passage = Passage(ours, copy.ffn(index), len(self._held_T))
                stack.enter_context(hooked(original.ffn(index), passage.remember))
            for batch, call in calls:
                given = (self._states.get(batch, call.args[0]), *call.args[1:])
                state = first(theirs.module, given, call.kwargs)
                self._states[batch] = state
                if passage is not None:
                    passage.see(call, state, self._real[batch])
            if passage is not None:
                self._train(index, passage)

    def _put(self, layer: Layer) -> None:
        """Give the result's own layer what its copy has learnt."""
        result, index = self._models[2].whole, str(layer.index)
        if index in self._done:
            tensors = result.tensors()
            for name, value in self._done[index]["values"].items():
                tensors[name].copy_(value.to(result.stored_dtype(name)))
            for part in result.stored(self._done[index]["values"], {}):
                self._writer.add(part.tensors, part.rows)

    def _train(self, index: int, passage: Passage) -> None:
        whole = self._models[1].whole
        tensors = whole.tensors()
        places = Places(self._form, self._moe, whole.target_of, tensors)
        chosen = dict.fromkeys(places.routers())
        for name in chosen:
            tensors[name].requires_grad_(True)
        masters = Masters(whole, chosen, (), self._engine)
        only = tuple(i == index for i in range(len(self._moe.sparse)))
        routers = Routers(whole.layers, replace(self._moe, sparse=only))
        frozen = masters.frozen()
        tokens = passage.tokens(self._held_T)
        found, kept = train_layer(passage.ffn, routers, tokens, masters, self._options, self._tell)
        masters.check_frozen(frozen)
        self.found[index] = found
        values, _ = masters.collected(kept)
        self._done[str(index)] = {"values": dict(values), "found": found.to_json()}
        self._kept.save(len(self._done), {"layers": self._done})

    def _tell(self, step: int, loss: float, norm: float) -> None:
        o = self._options
        step += len(self._done) * o.steps
        self._journal.step(step, {"loss": loss, "gradient": norm})
        if self._progress is not None:
            steps = len(self._layers) * o.steps
            tokens = (step * o.batch_tokens, steps * o.batch_tokens)
            self._progress(Progress(step, steps, *tokens))


def _together(texts: Texts) -> TokenSet:
    """Sequences to train on, then held-out ones; only their ids are looked at."""
    chosen = [texts.tokens.sequences[i] for i in texts.fitted]
    chosen += [texts.held.sequences[i] for i in texts.chosen]
    return replace(texts.tokens, sequences=tuple(chosen))


def _plan(
    source: TensorSource,
    changed: Changed,
    texts: Texts,
    options: TrainOptions,
    teacher: TensorSource,
    found: Mapping[int, Trained],
) -> Plan:
    layers = {str(i): one.to_json() for i, one in sorted(found.items())}
    said = _summary(found)
    report = {
        "error": "‖y − ŷ‖ / ‖y‖ of each layer's FFN on held-out tokens, which count by 1/‖h‖²; y "
        "is what would make the layer's output h, that of the original",
        "options": asdict(options),
        "teacher": teacher.label,
        "tokens": tokens_in(texts),
        "layers": layers,
    }
    return replace_tensors(
        source,
        changed,
        operation="train-router",
        preservation=Preservation("none", said),
        options=flags_of(texts, options, teacher),
        notes=(said,),
        decided={"text": texts.tokens.digest(), "layers": layers},
        reports={REPORT_NAME: report},
    )


def _summary(found: Mapping[int, Trained]) -> str:
    """One sentence."""
    each = list(found.values())
    changed = sum(x.changed for x in each)
    before, after = (sum(getattr(x, n) for x in each) / len(each) for n in ("before", "after"))
    return (
        f"routers trained layer by layer, {changed} of {len(each)} changed: error of the layer's "
        f"output {before:.3f} → {after:.3f} (mean over layers, held-out text)"
    )
