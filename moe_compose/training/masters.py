"""fp32 copies of what trains.

The optimizer moves the copies (masters) and nothing else; after each step they are rounded into
the model, which so computes with what it will be served with. Where rows of a tensor train, only
they have a copy: weight decay cannot reach the others, and the optimizer keeps no state for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_compose.errors import MoeComposeError
from moe_compose.runtime.whole import Whole
from moe_compose.training.chosen import Chosen
from moe_compose.training.engine import Engine, collected, local, shared_out


@dataclass(slots=True, eq=False)
class Master:
    """One tensor, or some rows of it.

    Attributes:
        home: the model's own tensor.
        rows: those of its first dimension that this process has a copy of; None: all.
        every_row: those that train, in all processes; None: all.
        value: the copy.
        stored: the dtype on disk.
        learns: the optimizer moves it; otherwise it is moved by hand (correction biases).
    """

    home: Tensor
    rows: Tensor | None
    every_row: tuple[int, ...] | None
    value: nn.Parameter
    stored: torch.dtype
    learns: bool = True

    def put(self, value: Tensor) -> None:
        """Round a value into the model."""
        with torch.no_grad():
            mine = local(self.home)
            if self.rows is None:
                mine.copy_(value)
            else:
                mine[self.rows] = value.to(mine.dtype)

    def take_gradient(self, engine: Engine) -> None:
        """Move the gradient from the model to the copy."""
        grad, self.home.grad = self.home.grad, None
        if grad is None:
            self.value.grad = torch.zeros_like(self.value)
            return
        mine = local(grad)
        if engine.sharded and not isinstance(self.home, DTensor):  # which nobody has averaged
            mine = engine.total(mine) / engine.size
        mine = mine if self.rows is None else mine[self.rows]
        self.value.grad = mine.to(self.value.dtype)

    def whole(self, value: Tensor) -> Tensor:
        """A value of all processes: the rows that train, on the CPU."""
        if self.rows is not None and self.every_row is not None:
            full = torch.zeros_like(local(self.home), dtype=value.dtype)
            full[self.rows] = value
            return collected(full, self.home)[list(self.every_row)].cpu()
        return collected(value, self.home).cpu()


class Masters:
    """All copies of a model.

    Args:
        whole: where exact values and dtypes on disk come from.
        chosen: what the optimizer moves.
        by_hand: what is moved otherwise.
        engine: which has prepared the model.

    Attributes:
        each: the copies, by name in memory.
    """

    def __init__(
        self, whole: Whole, chosen: Chosen, by_hand: Sequence[str], engine: Engine
    ) -> None:
        tensors = whole.tensors()
        self.each: dict[str, Master] = {}
        for name in (*chosen, *by_hand):
            self.each[name] = _master(whole, name, tensors[name], chosen, engine)
        self._engine = engine
        self._frozen = {n: t for n, t in tensors.items() if not self._all_trains(n)}

    def learning(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [m.value for m in self.each.values() if m.learns]

    def parameters(self) -> int:
        """How many numbers train, in all processes."""
        return sum(
            m.home.numel() if m.every_row is None else m.home[0].numel() * len(m.every_row)
            for m in self.each.values()
        )

    def take_gradients(self) -> float:
        """Move all gradients to the copies; returns their norm."""
        zero = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        shards, whole = zero.clone(), zero.clone()
        for master in self.each.values():
            if master.learns:
                master.take_gradient(self._engine)
                assert master.value.grad is not None
                squares = shards if isinstance(master.home, DTensor) else whole
                squares += master.value.grad.double().square().sum()
        return float((self._engine.total(shards) + whole).sqrt())

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        for value in self.learning():
            assert value.grad is not None
            value.grad.mul_(factor)

    def put_back(self) -> None:
        """Round all copies into the model."""
        for master in self.each.values():
            master.put(master.value)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """The model computes with the copies as they would be written."""
        for master in self.each.values():
            master.put(master.value.detach().to(master.stored))
        try:
            yield
        finally:
            self.put_back()

    def values(self) -> dict[str, Tensor]:
        """A snapshot of the copies of this process, on the CPU."""
        return {n: m.value.detach().cpu().clone() for n, m in self.each.items()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take up a snapshot."""
        with torch.no_grad():
            for name, master in self.each.items():
                master.value.copy_(values[name])
        self.put_back()

    def collected(
        self, values: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, tuple[int, ...]]]:
        """A snapshot of all processes, and its rows: what `Whole.stored` takes."""
        found = {n: m.whole(values[n].to(local(m.home).device)) for n, m in self.each.items()}
        return found, {n: m.every_row for n, m in self.each.items() if m.every_row is not None}

    def frozen(self) -> dict[str, str]:
        """Hex SHA-256 of what this process has of every tensor, or its rows, that do not train."""
        return {name: _sha256(self._rest(name, t)) for name, t in sorted(self._frozen.items())}

    def check_frozen(self, before: Mapping[str, str]) -> None:
        """Hold what does not train to its hashes.

        Raises:
            MoeComposeError: it has changed, which is a fault of this package.
        """
        after = self.frozen()
        if moved := [name for name in before if before[name] != after[name]]:
            raise MoeComposeError(
                f"{len(moved)} frozen tensors changed while others trained", problems=moved[:5]
            )

    def _all_trains(self, name: str) -> bool:
        return name in self.each and self.each[name].every_row is None

    def _rest(self, name: str, tensor: Tensor) -> Tensor:
        mine, master = local(tensor), self.each.get(name)
        if master is None or master.rows is None:
            return mine
        kept = torch.ones(len(mine), dtype=torch.bool, device=mine.device)
        kept[master.rows] = False
        return mine[kept]


def _master(whole: Whole, name: str, home: Tensor, chosen: Chosen, engine: Engine) -> Master:
    stored, every_row = whole.stored_dtype(name), chosen.get(name)
    rows = None if every_row is None else _rows_here(home, every_row)
    if rows is None and home.dtype == stored and stored in (torch.float32, torch.float64):
        value = local(home).detach()  # the model's own memory: nothing is ever rounded
    else:
        exact = shared_out(whole.exact(name).to(engine.device), home)
        value = (exact if rows is None else exact[rows]).clone()
    learns = name in chosen
    parameter = nn.Parameter(value, requires_grad=learns)
    return Master(home, rows, every_row, parameter, stored, learns)


def _rows_here(home: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor that this process has, counted in what it has of the tensor."""
    if not isinstance(home, DTensor):
        return torch.tensor(rows, device=home.device)
    flags = torch.zeros(home.shape, dtype=torch.bool)
    flags[list(rows)] = True
    return shared_out(flags, home).flatten(1).any(-1).nonzero().flatten()


def _sha256(tensor: Tensor) -> str:
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(content.data).hexdigest()
