"""The steps: gradients, balance, what is kept, and when to stop.

Shape suffixes: L sparse layers, T tokens, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from moe_compose.architectures.routing_form import Routing
from moe_compose.calibration.router import probabilities
from moe_compose.errors import CheckpointError
from moe_compose.training.balance import bias_step, switch_loss, z_loss
from moe_compose.training.batches import Share, Texts, shares_of, steps_of
from moe_compose.training.engine import Engine, shared_out
from moe_compose.training.journal import Journal
from moe_compose.training.masters import Masters
from moe_compose.training.measure import Evaluated, Forward, held_out_loss
from moe_compose.training.objectives import Objective
from moe_compose.training.options import Balance, TrainOptions
from moe_compose.training.routers import Seen
from moe_compose.training.state import States

#: A loss beyond so many times the first one, and so many nats more, is no training any more.
_FAR, _NATS = 2.0, 1.0

Stopped = Literal["", "steps", "patience", "diverged"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is.

    Attributes:
        step, steps: done, and in all.
        tokens, total: about the same in tokens.
        evaluated: the evaluation that has just been made, if one has.
        best: whether it is the best so far.
    """

    step: int
    steps: int
    tokens: int
    total: int
    evaluated: Evaluated | None = None
    best: bool = False


@dataclass(slots=True)
class History:
    """What has happened.

    Attributes:
        losses: of the objective, a step each, nats per token.
        evaluations: on held-out text, the first before any step.
        best: index of the best one.
        stopped: why there are no more steps; empty while there are.
        seconds: spent on steps and evaluations.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    best: int = 0
    stopped: Stopped = ""
    seconds: float = 0.0

    @property
    def since_best(self) -> int:
        """Evaluations without a gain."""
        return len(self.evaluations) - 1 - self.best


class Loop:
    """A training under way.

    Args:
        forward: the model.
        objective: what is minimised.
        masters: what trains.
        balance: against collapse.
        routing: the scheme.
        biases: correction biases by layer, names of masters.
        texts: what is trained on, and held out.
        options: all else.
        engine: the processes.
        states: where states are kept.
        journal: where lines go.
        progress: told after every step and evaluation.

    Attributes:
        history: what has happened.
        kept: the best values so far; None: those at the start.
    """

    def __init__(
        self,
        *,
        forward: Forward,
        objective: Objective,
        masters: Masters,
        balance: Balance,
        routing: Routing,
        biases: Mapping[int, str],
        texts: Texts,
        options: TrainOptions,
        engine: Engine,
        states: States,
        journal: Journal,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._forward, self._objective, self._masters = forward, objective, masters
        self._balance, self._routing, self._biases = balance, routing, biases
        self._texts, self._options, self._engine = texts, options, engine
        self._states, self._journal, self._progress = states, journal, progress
        self._optimizer = torch.optim.AdamW(
            masters.learning(), lr=options.lr, weight_decay=options.weight_decay
        )
        self._lengths = [len(s.ids) for s in texts.tokens.sequences]
        self.history = History()
        self.kept: dict[str, Tensor] = {}

    def run(self, state: Mapping[str, Any] | None) -> None:
        """From the start, or from a state that was kept, to the end."""
        if state is None:
            self.kept = self._masters.values()
            self._evaluate(0)
            if not math.isfinite(self.history.evaluations[0].loss):
                raise CheckpointError(
                    "the model's loss is not finite before any step",
                    hint="moe-compose validate names bad tensors; or compute with another --dtype.",
                )
        else:
            self._take_up(state)
        done, o = len(self.history.losses), self._options
        order = steps_of(self._texts.tokens, self._texts.fitted, o.batch_tokens, o.seed)
        for step, chosen in enumerate(islice(order, done, o.steps), done + 1):
            if self.history.stopped:
                return
            self._step(step, chosen)
            due = step % o.eval_every == 0 or step == o.steps
            if due and not self.history.stopped:
                self._evaluate(step)
                if o.patience is not None and self.history.since_best >= o.patience:
                    self.history.stopped = "patience"
            if step % o.save_every == 0 or step == o.steps or self.history.stopped:
                self._states.save(step, self._state())
        self.history.stopped = self.history.stopped or "steps"

    def _step(self, step: int, chosen: list[int]) -> None:
        begun = time.monotonic()
        found, norm, counts_LE = self._gradients(chosen)
        loss, switch, z = found.tolist()
        first = self.history.losses[0] if self.history.losses else loss
        self.history.losses.append(loss)
        finite = all(math.isfinite(x) for x in (loss, switch, z, norm))
        if not finite or loss > _FAR * first + _NATS:
            self.history.stopped = "diverged"
        else:
            self._masters.scale_gradients(min(1.0, self._options.clip / max(norm, 1e-30)))
            self._optimizer.step()
            self._move_biases(counts_LE)
            self._masters.put_back()
        seconds = time.monotonic() - begun
        self.history.seconds += seconds
        tokens = sum(self._lengths[i] for i in chosen)
        figures = {"loss": loss, "switch": switch, "z_loss": z, "gradient": norm}
        self._journal.step(step, figures | {"tokens_per_second": tokens / max(seconds, 1e-9)})
        self._tell(step)

    def _gradients(self, chosen: list[int]) -> tuple[Tensor, float, Tensor]:
        """Objective, switch and z-loss of a step, the norm of the gradients, and who got tokens."""
        counted = sum(self._objective.counted(self._lengths[i]) for i in chosen)
        tokens = sum(self._lengths[i] for i in chosen)
        engine, o = self._engine, self._options
        sums_3 = torch.zeros(3, dtype=torch.float64, device=engine.device)
        counts_LE: Tensor = torch.zeros(())
        where = (o.batch, engine.rank, engine.size, engine.device)
        for share in shares_of(self._texts.tokens, chosen, *where):
            logits_BSV, seen = self._forward.run(share)
            loss = self._objective.losses(logits_BSV, share, seen).sum() / counted
            here_LE = engine.total(torch.stack([s.counts_E for s in seen.values()]))
            counts_LE = counts_LE.to(here_LE.device) + here_LE
            switch, z = self._aside(share, seen, here_LE)
            part = share.tokens / tokens
            coefficient = o.balance_coef if self._balance == "switch" else 0.0
            engine.backward(loss + part * (coefficient * switch + o.z_loss * z))
            sums_3 += torch.stack([x.detach().double() for x in (loss, part * switch, part * z)])
        return engine.total(sums_3), self._masters.take_gradients(), counts_LE

    def _aside(
        self, share: Share, seen: Mapping[int, Seen], counts_LE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This process's part of the switch and the z-loss, mean over layers."""
        real_T, switches, zs = share.real_BS.flatten(), [], []
        for one, counts_E in zip(seen.values(), counts_LE, strict=True):
            logits_TE = one.logits_TE[real_T]
            p_TE = probabilities(logits_TE, self._routing)[:, : len(counts_E)]
            switches.append(switch_loss(counts_E, p_TE.sum(0) / share.tokens))
            zs.append(z_loss(logits_TE, share.tokens))
        return torch.stack(switches).mean(), torch.stack(zs).mean()

    def _move_biases(self, counts_LE: Tensor) -> None:
        if self._balance != "bias":
            return
        layers = list(self._forward.routers.layers)
        with torch.no_grad():
            for layer, name in self._biases.items():
                master = self._masters.each[name]
                moved = torch.zeros(master.home.shape, device=counts_LE.device)
                step_E = bias_step(counts_LE[layers.index(layer)], self._options.bias_rate)
                moved.view(-1)[: len(step_E)] = step_E
                master.value.add_(shared_out(moved, master.home))

    def _evaluate(self, step: int) -> None:
        begun = time.monotonic()
        with self._masters.as_stored():
            found = held_out_loss(
                self._forward,
                self._objective,
                self._texts.held,
                self._texts.chosen,
                self._engine,
                batch=self._options.batch,
                step=step,
            )
        history = self.history
        history.seconds += time.monotonic() - begun
        history.evaluations.append(found)
        best = found.loss < history.evaluations[history.best].loss
        if best:
            history.best = len(history.evaluations) - 1
            self.kept = self._masters.values()
        self._journal.evaluated(found)
        self._tell(step, found, best)

    def _tell(self, step: int, evaluated: Evaluated | None = None, best: bool = False) -> None:
        if self._progress is not None:
            o = self._options
            tokens = (step * o.batch_tokens, o.steps * o.batch_tokens)
            self._progress(Progress(step, o.steps, *tokens, evaluated, best))

    def _state(self) -> dict[str, Any]:
        h = self.history
        return {
            "values": self._masters.values(),
            "kept": self.kept,
            "optimizer": self._optimizer.state_dict(),
            "losses": h.losses,
            "evaluations": [e.to_json() for e in h.evaluations],
            "best": h.best,
            "stopped": h.stopped,
            "seconds": h.seconds,
        }

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self._masters.load(state["values"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.kept = dict(state["kept"])
        evaluations = [Evaluated.from_json(e) for e in state["evaluations"]]
        self.history = History(
            list(state["losses"]), evaluations, state["best"], state["stopped"], state["seconds"]
        )
