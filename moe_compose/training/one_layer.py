"""One layer's router, trained so that the layer's FFN returns what it should.

    minimise  E w‖y − ŷ‖² / E w‖y‖²      y: what the FFN should return, ŷ: what it does

An FFN sees tokens one by one. So each step runs some tokens, of any sequences, through
transformers' own block with everything frozen but the router, whatever its scheme is: gradients
reach it through the dispatched weights.

Shape suffixes: T tokens, N some of them, D model, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.surgery.draws import Draw
from moe_compose.training.masters import Masters
from moe_compose.training.measure import Spread
from moe_compose.training.options import TrainOptions
from moe_compose.training.routers import Routers

#: Told of every step: its number, the loss, the norm of the gradient.
Tell = Callable[[int, float, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What a layer's FFN is given and should return.

    Attributes:
        x_TD: inputs.
        y_TD: what it should return.
        w_T: how much each token counts, 1 in the mean.
        held_T: tokens that are not trained on.
    """

    x_TD: Tensor  # noqa: N815
    y_TD: Tensor  # noqa: N815
    w_T: Tensor  # noqa: N815
    held_T: Tensor  # noqa: N815


@dataclass(frozen=True, slots=True)
class Trained:
    """What became of a layer. Errors are the root of `Σ w‖y − ŷ‖² / Σ w‖y‖²`, of what is stored.

    Attributes:
        before, after: on held-out tokens.
        fitted_before, fitted_after: on the tokens that were trained on.
        step: after which the router was best; 0: it stays as it was.
        steps: that were made.
        stopped: why no more: steps, patience, diverged.
        load_before, load_after: how held-out tokens are spread over experts.
    """

    before: float
    after: float
    fitted_before: float
    fitted_after: float
    step: int
    steps: int
    stopped: str
    load_before: Spread
    load_after: Spread

    @property
    def changed(self) -> bool:
        """Whether the error on held-out tokens fell."""
        return self.step > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "changed": self.changed}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Trained:
        """What `to_json` made."""
        given = {n: v for n, v in found.items() if n != "changed"}
        for name in ("load_before", "load_after"):
            spread = given[name]
            given[name] = Spread(**{**spread, "load": tuple(spread["load"])})
        return cls(**given)


def train_layer(
    block: nn.Module,
    routers: Routers,
    tokens: Tokens,
    masters: Masters,
    options: TrainOptions,
    tell: Tell,
) -> tuple[Trained, dict[str, Tensor]]:
    """Train a layer's router.

    Args:
        block: the module that holds router and experts.
        routers: the layer's, to be watched.
        tokens: what it is held to.
        masters: copies of what trains.
        options: steps, rates, when to evaluate and to stop.
        tell: told of every step.

    Returns:
        What became of it, and the best values on held-out tokens, those at the start among them.
    """
    run = _Run(block, routers, tokens, masters, options.batch_tokens)
    kept, (before, load_before) = masters.values(), run.measured(held=True)
    fitted_before, _ = run.measured(held=False)
    after, load_after, best, evaluations = before, load_before, 0, [0]
    optimizer = torch.optim.AdamW(
        masters.learning(), lr=options.lr, weight_decay=options.weight_decay
    )
    done, stopped = 0, "steps"
    for step, some_N in enumerate(islice(run.minibatches(options.seed), options.steps), 1):
        loss, norm = run.gradients(some_N)
        tell(step, loss, norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            stopped = "diverged"
            break
        masters.scale_gradients(min(1.0, options.clip / max(norm, 1e-30)))
        optimizer.step()
        masters.put_back()
        done = step
        if step % options.eval_every and step != options.steps:
            continue
        evaluations.append(step)
        error, load = run.measured(held=True)
        if error < after:
            after, load_after, best, kept = error, load, step, masters.values()
        since = len(evaluations) - 1 - evaluations.index(best)
        if options.patience is not None and since >= options.patience:
            stopped = "patience"
            break
    masters.load(kept)
    fitted_after, _ = run.measured(held=False)
    errors = (before, after, fitted_before, fitted_after)
    return Trained(*errors, best, done, stopped, load_before, load_after), kept


class _Run:
    """One layer's training under way."""

    def __init__(
        self, block: nn.Module, routers: Routers, tokens: Tokens, masters: Masters, batch: int
    ) -> None:
        self._block, self._routers, self._tokens = block, routers, tokens
        self._masters, self._batch = masters, batch
        self._fitted_N = (~tokens.held_T).nonzero().flatten()
        self._held_N = tokens.held_T.nonzero().flatten()
        squares = sum(float(self._size(some_N)) for some_N in self._parts(False))
        self._scale = max(squares / len(self._fitted_N), 1e-30)

    def minibatches(self, seed: int) -> Iterator[Tensor]:
        """Tokens of each step, without end: all of them in a new order in every epoch."""
        (layer,) = self._routers.layers
        most = min(self._batch, len(self._fitted_N))
        epoch = 0
        while True:
            generator = Draw(seed, f"layer {layer}, order of epoch {epoch}").generator()
            order = torch.from_numpy(generator.permutation(len(self._fitted_N)))
            for at in range(0, len(order) - most + 1, most):
                some_N = order[at : at + most].to(self._fitted_N.device)
                yield self._fitted_N[some_N]
            epoch += 1

    def gradients(self, some_N: Tensor) -> tuple[float, float]:
        """Move the gradient of some tokens' loss to the copies; loss and norm."""
        with torch.enable_grad():
            loss = self._lack(some_N) / (len(some_N) * self._scale)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), self._masters.take_gradients()

    def measured(self, *, held: bool) -> tuple[float, Spread]:
        """Error on held-out tokens or on the others, and their spread over experts."""
        lack = norm = 0.0
        (layer,) = self._routers.layers
        counts: Tensor | None = None
        with torch.no_grad(), self._masters.as_stored():
            for some_N in self._parts(held):
                with self._routers.watching(torch.ones_like(some_N, dtype=torch.bool)) as seen:
                    lack += float(self._lack(some_N))
                norm += float(self._size(some_N))
                counts_E = seen[layer].counts_E.double()
                counts = counts_E if counts is None else counts + counts_E
        assert counts is not None
        return math.sqrt(lack / norm) if norm else 0.0, Spread.of(counts.tolist())

    def _parts(self, held: bool) -> Iterator[Tensor]:
        some_N = self._held_N if held else self._fitted_N
        for at in range(0, len(some_N), self._batch):
            yield some_N[at : at + self._batch]

    def _lack(self, some_N: Tensor) -> Tensor:
        """Σ w‖y − ŷ‖²."""
        found = self._block(self._tokens.x_TD[some_N][None])
        found = found[0] if isinstance(found, tuple) else found
        y_ND = self._tokens.y_TD[some_N]
        return self._sum(wide(found.reshape(y_ND.shape)) - wide(y_ND), some_N)

    def _size(self, some_N: Tensor) -> Tensor:
        """Σ w‖y‖²."""
        return self._sum(wide(self._tokens.y_TD[some_N]), some_N)

    def _sum(self, x_ND: Tensor, some_N: Tensor) -> Tensor:
        return (x_ND.square().sum(-1) * self._tokens.w_T[some_N]).sum()


def wide(x_ND: Tensor) -> Tensor:
    """In fp32, or fp64 as it is."""
    return x_ND if x_ND.dtype == torch.float64 else x_ND.float()
