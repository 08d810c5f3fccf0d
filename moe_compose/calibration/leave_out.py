"""What a layer's routed output loses without one of its experts, and in which order it can do
without most of them, on a sample of its tokens.

    loo-mse         Σ_t ‖y(without e) − y‖² (NVIDIA Model-Optimizer)
    naee-greedy     that expert goes without which Σ_t ‖y(without all that went) − y‖² is smallest,
                    again and again; NAEE (2402.14800) tries all subsets of 8

y is what the routed experts return together; another expert takes the place of one that is masked
(`masked_error.py`). The second needs all experts on every token of the sample, and
`8 · tokens · E²` bytes, so it is for at most `GREEDY_EXPERTS`; the first runs only those that can
take a place. Routing is the reference's, from the logits that the layer computed: where it is not
what the layer did, nothing is measured.

Shape suffixes: S tokens of the sample, T of a batch, E experts, Z rows of the router, H = 2 halves,
G halves · domains.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_compose.calibration.calls import Call
from moe_compose.calibration.masked_error import MaskedRouter, Sample, removal_steps
from moe_compose.calibration.pairs import experts_of, hidden_of
from moe_compose.calibration.record import HALVES
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.routing import Routed
from moe_compose.surgery.prune_options import GREEDY_EXPERTS
from moe_compose.surgery.selection import moe_form

#: How far the reference's routing may be from the layer's, which may be in 16 bits: share of the
#: chosen experts that are others, and relative difference of the weights.
_OTHERS, _APART = 0.02, 0.1

_HINT = "Leave --loo-tokens out."


def router_of(source: TensorSource, layer: int) -> MaskedRouter:
    """A layer's routing; reads its vectors.

    Raises:
        UnsupportedError: no MoE, or one whose experts can only be counted.
    """
    form, moe = moe_form(source)
    names: dict[str, str] = {line.kind: line.name.format(i=layer) for line in form.router}

    def vector(kind: str, wanted: bool) -> Tensor | None:
        name = names.get(kind, "") if wanted else ""
        return source.read(name).flatten().double() if name in source.tensors else None

    return MaskedRouter(
        moe=moe,
        bias_Z=vector("correction_bias", moe.routing.selection_bias),
        scale_Z=vector("scale", moe.routing.expert_scale),
    )


class LeaveOut:
    """Takes the sample while text passes through a layer; masks its experts when all has passed.

    Args:
        layer: index of the layer.
        experts: the module that computes its experts.
        router: its routing.
        sample: batch → (places among its positions, places in the sample), int64 `[N]` each.
        groups: G.
    """

    def __init__(
        self,
        layer: int,
        experts: nn.Module,
        router: MaskedRouter,
        sample: Mapping[int, tuple[Tensor, Tensor]],
        groups: int,
    ) -> None:
        self._layer, self._experts, self._router = layer, experts, router
        self._sample, self._groups = sample, groups
        self._size = sum(len(slots) for _, slots in sample.values())
        self._tables: dict[str, Tensor] = {}

    def take(self, batch: int, call: Call, logits_TZ: Tensor | None, groups_T: Tensor) -> None:
        """Keep what the layer was given, and decided, for a batch's tokens of the sample.

        Raises:
            UnsupportedError: the router's logits are unknown.
        """
        if batch not in self._sample:
            return
        if logits_TZ is None:
            raise UnsupportedError(
                f"the router of layer {self._layer} cannot be read, so no expert can be masked",
                hint=_HINT,
            )
        places, slots = self._sample[batch]
        tables = {"x": call.x_TD, "logits": logits_TZ, "group": groups_T}
        tables |= {"experts": call.ids_TK, "weights": call.gates_TK}
        for name, table in tables.items():
            rows = table[places.to(table.device)].cpu()
            if name not in self._tables:
                self._tables[name] = rows.new_zeros(self._size, *rows.shape[1:])
            self._tables[name][slots] = rows

    def result(self) -> dict[str, Tensor]:
        """`loo_HCE`, `[G, E]`, and `greedy_3E` where the experts are few enough; fp64.

        Raises:
            UnsupportedError: the layer does not route as the reference does.
        """
        t, experts = self._tables, self._router.moe.num_experts
        self._check(self._router(t["logits"]))
        few = experts <= GREEDY_EXPERTS
        x_SD = t["x"].to(next(self._experts.parameters()).device)
        # what a layout describes ends with the experts; other modules know of rows of no FFN
        ran = t["logits"].shape[1] if hidden_of(self._experts) is None else experts
        run = experts_of(self._experts)
        sample = Sample.of(self._router, t["logits"], run, ran, x_SD, everything=few)
        loo = torch.zeros(self._groups, experts, dtype=torch.float64)
        for e, (tokens_N, masked) in enumerate(self._router.each(t["logits"], sample.whole)):
            loo[:, e].index_add_(0, t["group"][tokens_N], sample.error(tokens_N, masked))
        if not few:
            return {"loo_HCE": loo}
        half_S = t["group"] // (self._groups // HALVES)
        halves = (sample.part(half_S == half) for half in range(HALVES))
        steps = [removal_steps(part) for part in (sample, *halves)]
        return {"loo_HCE": loo, "greedy_3E": torch.stack(steps)}

    def _check(self, mine: Routed) -> None:
        """Hold the reference's routing to what the layer did, a factor for all weights aside."""
        ids_SK, own_SK = self._tables["experts"].long(), self._tables["weights"].double()
        zeros_SZ = torch.zeros(self._tables["logits"].shape, dtype=torch.float64)
        found = zeros_SZ.scatter(1, mine.experts_TK, mine.weights_TK.double())
        own = zeros_SZ.scatter(1, ids_SK, own_SK)
        others = 1 - float((found != 0)[own != 0].double().mean())
        factor = (found * own).sum() / own.square().sum()
        apart = float((found - factor * own).norm() / found.norm())
        if others > _OTHERS or not apart <= _APART:
            raise UnsupportedError(
                f"layer {self._layer} does not route as is known of its family ({others:.1%} other "
                f"experts, weights {apart:.1%} apart), so its experts cannot be masked",
                hint=_HINT,
            )
