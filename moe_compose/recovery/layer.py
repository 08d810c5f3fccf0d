"""One layer's refit: which experts have enough tokens, the solution, and whether it is an
improvement on tokens that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compose.calibration.pairs import experts_of, hidden_of
from moe_compose.errors import UnsupportedError
from moe_compose.recovery.homes import Homes, New
from moe_compose.recovery.options import RefitOptions
from moe_compose.recovery.ridge import Hidden, Routed, fit
from moe_compose.runtime import Layer

#: Tokens on which the experts are recomputed from their parts, and the relative error beyond which
#: they are not what the refit takes them for.
_PROBE, _WRONG = 64, 0.05


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """What became of a layer. Errors are `‖y − ŷ‖ / ‖y‖` of the routed output.

    Attributes:
        before, after: on held-out tokens, with the new matrices as they are stored.
        fitted_before, fitted_after: on the tokens that were fitted to.
        changed: whether the new matrices are taken: the error on held-out tokens fell.
        experts: refitted ones, by their ids in the result.
        left: expert → its tokens, too few of them.
    """

    before: float
    after: float
    fitted_before: float
    fitted_after: float
    changed: bool
    experts: tuple[int, ...]
    left: Mapping[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        left = {str(e): n for e, n in self.left.items()}
        return {**asdict(self), "experts": list(self.experts), "left": left}


def hidden_of_layer(layer: Layer) -> Hidden:
    """What the second matrix of each of a layer's experts is given.

    Raises:
        UnsupportedError: the experts are not two matrices with an activation between them.
    """
    hidden = hidden_of(layer.experts)
    if hidden is None:
        name = type(layer.experts).__name__
        raise UnsupportedError(f"{name} is not two matrices with an activation between them")
    return hidden


def refit_layer(
    layer: Layer,
    routed: Routed,
    wanted_TD: Tensor,
    held_T: Tensor,
    homes: Homes,
    options: RefitOptions,
) -> tuple[Refitted, New]:
    """Solve a layer of the result.

    Args:
        layer: the result's, real.
        routed: all tokens, and what its experts lack.
        wanted_TD: what the original's experts returned together.
        held_T: tokens that are not fitted to.
        homes: where the matrices are stored.
        options: ridge and sweeps.

    Raises:
        UnsupportedError: the experts compute something else than they are taken for.
    """
    check_parts(layer, routed, wanted_TD, homes.moe.num_experts)
    fitted = routed.at(~held_T)
    width = _width(routed)
    counts = torch.bincount(fitted.ids_TK.flatten(), minlength=homes.moe.num_experts).tolist()
    experts = [e for e in range(homes.moe.num_experts) if counts[e] >= width]
    wanted = fit(fitted, experts, ridge=options.ridge, sweeps=options.sweeps)
    new = homes.changed(layer.index, wanted)
    lack_TD, norm = routed.after(new.changes), wanted_TD.double().square()

    def error(lack: Tensor, some_T: Tensor) -> float:
        whole = float(norm[some_T].sum())
        return (float(lack[some_T].double().square().sum()) / whole) ** 0.5 if whole else 0.0

    before, after = error(routed.lack_TD, held_T), error(lack_TD, held_T)
    found = Refitted(
        before=before,
        after=after,
        fitted_before=error(routed.lack_TD, ~held_T),
        fitted_after=error(lack_TD, ~held_T),
        changed=bool(new.tensors) and after < before,
        experts=tuple(new.changes),
        left={e: counts[e] for e in range(homes.moe.num_experts) if counts[e] < width},
    )
    return found, new


def _width(routed: Routed) -> int:
    """F."""
    return routed.hidden(0, routed.x_TD[:1]).shape[-1]


def check_parts(layer: Layer, routed: Routed, wanted_TD: Tensor, experts: int) -> None:
    """Hold the experts, recomputed one by one with the dispatched weights, to what they returned.

    Raises:
        UnsupportedError: they compute something else.
    """
    run = experts_of(layer.experts)
    x_TD, ids_TK = routed.x_TD[:_PROBE], routed.ids_TK[:_PROBE]
    gates_TK = routed.gates_TK[:_PROBE].double()
    returned_TD = (wanted_TD - routed.lack_TD)[:_PROBE].double()
    sum_TD = torch.zeros_like(returned_TD)
    for expert in range(experts):
        token_N, slot_N = torch.where(ids_TK == expert)
        if len(token_N):
            f_ND = run(expert, x_TD[token_N]).double()
            sum_TD.index_add_(0, token_N, gates_TK[token_N, slot_N, None] * f_ND)
    apart = float((sum_TD - returned_TD).norm())
    if apart > _WRONG * max(float(returned_TD.norm()), 1e-30):
        name = type(layer.experts).__name__
        raise UnsupportedError(
            f"layer {layer.index}: {name} returns something else than the weighted sum of its "
            f"experts (relative error {apart / max(float(returned_TD.norm()), 1e-30):.2g}): it "
            "cannot be refitted"
        )
