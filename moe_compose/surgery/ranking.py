"""`Ranking`: what every expert of every layer is worth, wherever that came from.

Surgery is told, it does not measure: calibration makes rankings from statistics or weights, other
tools' come from a file. As a file:

    {"3": [5, 0, 2, ...], ...}              layer → experts, best first
    {"ranking": {"3": [5, 0, ...], ...}}    the same inside of more, as pruning.json holds it
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compose.errors import OptionError
from moe_compose.surgery.draws import Draw
from moe_compose.surgery.history import read_json


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Worth of experts; the larger, the more. Ties go to the lower id.

    Attributes:
        criterion: what it means.
        worths: sparse layer → worth of each expert.
        guarded: layer → experts that are kept whatever they are worth.
        of: what it was made from, as plain values, for the record.
        notes: what a user should know of it before pruning by it.

    Example:
        >>> Ranking(criterion="reap", worths={0: (0.5, 2.0, 0.5)}).order(0)
        (1, 0, 2)
    """

    criterion: str
    worths: Mapping[int, tuple[float, ...]]
    guarded: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    of: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def order(self, layer: int) -> tuple[int, ...]:
        """A layer's experts, best first."""
        worth = self.worths[layer]
        return tuple(sorted(range(len(worth)), key=lambda e: (-worth[e], e)))

    def problems(self, experts: int, layers: Sequence[int]) -> Iterator[str]:
        """Why it is no ranking of these layers, in words."""
        if missing := sorted(set(layers) - set(self.worths)):
            yield f"the ranking lacks layers {missing}, which have experts"
        if surplus := sorted(set(self.worths) - set(layers)):
            yield f"the ranking has layers {surplus}, which have no experts"
        for layer, worth in self.worths.items():
            if len(worth) != experts:
                yield f"layer {layer}: {len(worth)} experts are ranked, there are {experts}"
            elif not all(math.isfinite(w) for w in worth):
                wrong = [e for e, w in enumerate(worth) if not math.isfinite(w)]
                yield f"layer {layer}: the worths of experts {wrong} are not finite"

    @classmethod
    def given(cls, orders: Mapping[Any, Sequence[int]], **rest: Any) -> Ranking:
        """From experts, best first, by layer.

        Raises:
            OptionError: a layer that is no number, or a list that does not name every expert once.
        """
        worths, problems = {}, []
        for layer, order in orders.items():
            ids = list(order) if isinstance(order, Sequence) else []
            if not str(layer).isdecimal():
                problems.append(f"{layer!r} is no layer")
            elif not ids or sorted(map(str, ids)) != sorted(map(str, range(len(ids)))):
                problems.append(f"layer {layer}: every expert must be named once, best first")
            else:
                rank = {int(e): i for i, e in enumerate(ids)}
                worths[int(layer)] = tuple(-float(rank[e]) for e in range(len(ids)))
        if problems or not worths:
            raise OptionError("this is no ranking of experts", problems=problems or ["it is empty"])
        return cls(criterion="given", worths=worths, **rest)

    @classmethod
    def load(cls, path: Path) -> Ranking:
        """From a file.

        Raises:
            CheckpointError: unreadable.
            OptionError: it holds no ranking.
        """
        found = read_json(path, path.parent.name or ".")
        if isinstance(found, Mapping) and isinstance(found.get("ranking"), Mapping):
            found = found["ranking"]
        if not isinstance(found, Mapping):
            raise OptionError(
                f"{path.name} holds no ranking of experts",
                hint='It must be a JSON object: {"layer": [experts, best first], ...}.',
            )
        return cls.given(found, of={"file": path.name})

    @classmethod
    def random(cls, experts: int, layers: Sequence[int], seed: int) -> Ranking:
        """An order drawn for each layer."""
        orders = {
            i: Draw(seed, f"random ranking of layer {i}").generator().permutation(experts).tolist()
            for i in layers
        }
        worths = cls.given(orders).worths
        return cls(criterion="random", worths=worths, of={"seed": seed})

    def orders(self) -> dict[str, list[int]]:
        """Layer → experts, best first, as files hold it."""
        return {str(layer): list(self.order(layer)) for layer in sorted(self.worths)}
