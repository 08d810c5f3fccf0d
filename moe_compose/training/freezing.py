"""`freeze`: the stages of Branch-Adapt-Route (2604.18473) in anybody's training loop.

A pair has two experts: 0 is the anchor, the post-trained base's own FFN, which stays as it is with
its router row; 1 is the domain's, which trains. Which shared parameters train beside it depends on
the stage:

    mid   none
    sft   embedding and head
    rl    all

transformers stacks experts, and optimizers know tensors only. So rows that are frozen get no
gradient, and are put back after every step, since weight decay moves what has no gradient too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moe_compose.architectures import Architecture, MoE, find
from moe_compose.architectures.parts import Locator
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.runtime import compat
from moe_compose.surgery.anchor import FREEZE, FREEZE_NAME
from moe_compose.training.chosen import Chosen, Places


class Freeze(TrainerCallback):  # type: ignore[misc]
    """A model of which only some parameters, or rows of them, train.

    A callback for `transformers.Trainer`; in other loops call `after_step` after every step of the
    optimizer.

    Args:
        model: whose parameters are marked.
        trains: parameter → rows that train; None: all of them. The others are frozen.

    Attributes:
        trains: as given.

    Example:
        >>> trainer = Trainer(model, callbacks=[freeze(model, "mid")], ...)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, trains: Chosen) -> None:
        self.trains = dict(trains)
        self._kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trains)
            if (rows := trains.get(name)) is not None:
                self._keep(parameter, rows)

    def after_step(self) -> None:
        """Put frozen rows back."""
        with torch.no_grad():
            for parameter, frozen, values in self._kept:
                parameter[frozen] = values

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As the Trainer calls it."""
        self.after_step()

    def _keep(self, parameter: nn.Parameter, rows: tuple[int, ...]) -> None:
        frozen = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
        frozen[list(rows)] = False
        shape = (-1, *([1] * (parameter.dim() - 1)))
        hook = partial(_masked, frozen.view(shape))
        parameter.register_hook(hook)  # type: ignore[no-untyped-call]
        self._kept.append((parameter, frozen, parameter.detach()[frozen].clone()))


def _masked(frozen: Tensor, grad: Tensor) -> Tensor:
    return grad.masked_fill(frozen, 0)


def freeze(model: Any, stage: str, plan: str | Path | Mapping[str, Any] | None = None) -> Freeze:
    """Freeze a pair of experts for a stage of Branch-Adapt-Route (METHODS section 3.3).

    Args:
        model: an MoE as transformers loaded it, before it is wrapped or sharded.
        stage: `mid`, `sft` or `rl`, or one that the plan names.
        plan: a `freeze.json`, or what it holds: `anchors`, experts that stay with their router
            rows, and `stages`, for each the shared parts that train; None: what `anchor` writes.

    Returns:
        What keeps frozen rows frozen: a callback of `transformers.Trainer`, or to be told of every
        step.

    Raises:
        OptionError: a stage that is not planned, anchors that the model does not have.
        UnsupportedError: no MoE of a known family.

    Example:
        >>> kept = freeze(model, "sft")           # doctest: +SKIP
        >>> optimizer.step(); kept.after_step()   # doctest: +SKIP
    """
    planned = _read(FREEZE if plan is None else plan)
    if stage not in planned.stages:
        raise OptionError(f"stage ({stage}) is none of {', '.join(planned.stages)}")
    config = model.config.to_dict()
    form = find(config)
    if form is None or not form.is_moe or not form.moe(config).sparse_layers:
        raise UnsupportedError(f"{type(model).__name__} is no mixture of experts of a known family")
    moe = form.moe(config)
    if any(a >= moe.num_experts for a in planned.anchors):
        experts = ", ".join(map(str, planned.anchors))
        raise OptionError(f"anchors ({experts}) must be below {moe.num_experts}, the experts")
    return Freeze(model, _trains(model, form, moe, planned, planned.stages[stage]))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a `freeze.json` holds."""

    anchors: tuple[int, ...]
    stages: Mapping[str, tuple[str, ...]]


def _read(plan: str | Path | Mapping[str, Any]) -> _Plan:
    name = FREEZE_NAME if isinstance(plan, Mapping) else Path(plan).name
    try:
        found = plan if isinstance(plan, Mapping) else json.loads(Path(plan).read_bytes())
        anchors = tuple(int(a) for a in found["anchors"])
        return _Plan(anchors, {str(s): tuple(p) for s, p in found["stages"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise OptionError(
            f"{name} does not say what to freeze ({type(e).__name__}: {e})",
            hint=f"It looks like {json.dumps(FREEZE)}.",
        ) from e


def _trains(
    model: Any, form: Architecture, moe: MoE, planned: _Plan, shared: tuple[str, ...]
) -> Chosen:
    tensors = dict(model.named_parameters())
    places = Places(form, moe, _targets(model, form, moe).get, tensors)
    found: Chosen = {}
    for expert in (e for e in range(moe.num_experts) if e not in planned.anchors):
        for part in (places.expert(expert), places.router_rows(expert)):
            for name, rows in part.items():
                found[name] = None if rows is None else (*(found.get(name) or ()), *rows)
    own = {n for e in range(moe.num_experts) for n in places.expert(e)} | {*places.routers()}
    locator = Locator(form, len(moe.sparse))
    ends = {places.named(form.embedding): "embedding", places.named(form.head): "head"}
    for name in tensors.keys() - own:
        kind = ends.get(name) or locator.place(name).kind
        if "all" in shared or kind in shared:
            found[name] = None
    return found


def _targets(model: Any, form: Architecture, moe: MoE) -> dict[str, str]:
    """Name on disk → name in memory, of all that the family may have on disk for its experts."""
    assert form.experts is not None
    each = (*form.experts.names, *form.experts.biases)
    names = {form.embedding, form.head}
    for layer in moe.sparse_layers:
        names |= {t.name.format(i=layer) for t in form.router}
        names |= {n.format(i=layer, e=e) for n in each for e in range(moe.num_experts)}
    jobs, _ = compat.jobs_of(model, names)
    return {name: job.target for job in jobs for name, _ in job.sources}
