"""One layer's experts, measured while text passes through them.

What the model computes is not touched: hooks see what the experts are given (hidden states, chosen
experts, dispatched weights: the model's own routing, whatever it is), and what the router was. What
the experts' sum does not tell, ‖f‖, is taken while they run (`once.py`).

The token weight of EASY-EP (2504.06792) is max(1 − cos(h, h + moe(h)), 0), with h the residual
stream before the block and moe(h) what the routed experts return, as in its authors' code: shared
experts do not count, nor do a norm or a multiplier behind the block, where a family has one.

Shape suffixes: B sequences, S positions, T tokens that are no padding, D model, E experts, K top-k,
H = 2 halves, C domains, G = H·C, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_compose.architectures import MoE
from moe_compose.calibration import calls
from moe_compose.calibration.calls import Call, Kept
from moe_compose.calibration.leave_out import LeaveOut
from moe_compose.calibration.pairs import sizes
from moe_compose.calibration.record import HALVES
from moe_compose.calibration.residual import Residual
from moe_compose.calibration.router import RouterView, probabilities
from moe_compose.calibration.stats import MEASURES, LayerStats
from moe_compose.calibration.tokens import Rows
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.runtime import Layer

#: Elements of the residual stream that are fp64 at a time: what a core's cache holds.
_CACHED = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is being measured, the same for all layers.

    Attributes:
        rows: the batches, as the runner counts them.
        domains: how many.
        moe: what the config says of the experts.
        sample: batch → (places among its positions, places in the sample), int64 `[N]` each.
        sampled: tokens of the sample.
    """

    rows: Sequence[Rows]
    domains: int
    moe: MoE
    sample: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sampled: int = 0

    @property
    def experts(self) -> int:
        """E."""
        return self.moe.num_experts

    @property
    def groups(self) -> int:
        """G."""
        return HALVES * self.domains


class Observer:
    """Adds up one layer.

    Args:
        layer: the decoder layer, real.
        experts: the module that computes its experts.
        subject: what is measured.
        tick: told how many tokens were measured.
        leave_out: masks experts on a sample of tokens; None where that is not wanted.

    Attributes:
        inputs_SD: what the experts were given for the sample of tokens, fp32, on the CPU; None
            until there is some.
        logits_SE: the router's logits for them.
    """

    def __init__(
        self,
        layer: Layer,
        experts: nn.Module,
        subject: Subject,
        tick: Callable[[int], None],
        leave_out: LeaveOut | None = None,
    ) -> None:
        self._layer, self._experts = layer, experts
        self._subject, self._tick, self._leave_out = subject, tick, leave_out
        self._residual = Residual()
        self._rows = subject.experts + subject.moe.zero_experts
        self._router = RouterView(layer, experts, self._rows, subject.moe.routing)
        self._sums: dict[str, Tensor] = {}
        self._routers_seen = 0
        self._seen = 0
        self.inputs_SD: Tensor | None = None
        self.logits_SE: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure all calls of the layer's experts in this context.

        Raises:
            UnsupportedError: the experts are not given every token of a batch, once.
        """
        with (
            self._residual.watching(self._layer.module, self._experts),
            self._router.watching(),
            calls.watching(self._layer, self._experts, self._subject.moe, self._see),
        ):
            yield

    def result(self) -> LayerStats:
        """The sums, on the CPU. Experts are masked now, if they are to be.

        Raises:
            UnsupportedError: some batch never reached the experts, or none can be masked.
            CheckpointError: the layer computes what is no number.
        """
        if self._seen != len(self._subject.rows):
            batches = f"{self._seen} of {len(self._subject.rows)} batches"
            raise UnsupportedError(f"layer {self._layer.index} ran its experts on {batches}")
        shape, found = (HALVES, self._subject.domains), {}
        masked = {} if self._leave_out is None else self._leave_out.result()
        for name, total in (self._sums | masked).items():
            grouped = name.rpartition("_")[2].startswith("HC")
            found[name] = (total.view(*shape, *total.shape[1:]) if grouped else total).cpu()
        if self._routers_seen != self._seen:
            router = ("probability_HCE", "entropy_HC", "agree_HC", "logit_E", "logit_EE")
            found = {name: t for name, t in found.items() if name not in router}
        if not all(bool(t.isfinite().all()) for t in found.values()):
            raise CheckpointError(
                f"layer {self._layer.index} computes NaN or infinite values",
                hint="moe-compose validate names bad tensors; or compute with --dtype float32.",
            )
        return LayerStats(**found)

    def _see(self, call: Call) -> None:
        rows = self._subject.rows[self._layer.index_of_batch]
        real_T = rows.real.flatten().to(call.x_TD.device)
        if len(call.x_TD) != len(real_T):
            raise UnsupportedError(
                f"layer {self._layer.index} gives its experts {len(call.x_TD)} tokens of a batch "
                f"of {len(real_T)}; its statistics cannot be told by domain"
            )
        kept = slice(None) if rows.batch.mask is None else real_T
        groups_T = (rows.half_B * self._subject.domains + rows.domain_B)[:, None]
        groups_T = groups_T.expand(rows.batch.ids.shape).flatten().to(real_T.device)
        h_TD = self._residual.before(call.x_TD)
        logits_TE = self._router.take(len(call.x_TD))
        self._take_sample(call.x_TD, logits_TE)
        if self._leave_out is not None:
            self._leave_out.take(self._layer.index_of_batch, call, logits_TE, groups_T)
        groups_T = groups_T[kept]
        token_T = token_weight(h_TD[kept], call.y_TD[kept])
        self._add_pairs(call, kept, groups_T, token_T)
        chosen_TE = _chosen(call.ids_TK[kept], self._rows)
        self._add_tokens(call.x_TD[kept], chosen_TE, groups_T)
        if logits_TE is not None:
            self._add_router(logits_TE[kept], chosen_TE, call.ids_TK.shape[1], groups_T)
        self._seen += 1
        self._tick(int(real_T.sum()))

    def _add_pairs(self, call: Call, kept: Kept, groups_T: Tensor, token_T: Tensor) -> None:
        """The measures of the pairs."""
        experts, groups = self._subject.experts, self._subject.groups
        ids_TK, gates_TK = call.ids_TK[kept], call.gates_TK[kept].double()
        norm_TK, peak_TK = call.pairs(kept)
        gated_TK = gates_TK * norm_TK if call.applied else norm_TK
        values = (
            *(torch.ones_like(norm_TK), gates_TK, norm_TK, norm_TK.square()),
            *(gated_TK, token_T[:, None] * gated_TK),
        )
        valid_TK = (ids_TK >= 0) & (ids_TK < experts)
        place = (groups_T[:, None] * experts + ids_TK)[valid_TK]
        sums = _sum_at(torch.stack(values, -1)[valid_TK], place, groups * experts)
        self._add("sums_HCME", sums.view(groups, experts, len(MEASURES)).transpose(1, 2))
        peaks = _max_at(peak_TK[valid_TK], place, groups * experts).view(groups, experts)
        self._add("peak_HCE", peaks, largest=True)

    def _add_tokens(self, x_TD: Tensor, chosen_TE: Tensor, groups_T: Tensor) -> None:
        """Which experts are chosen together, and how large their inputs are."""
        chosen_TE = chosen_TE[:, : self._subject.experts]
        self._add("together_EE", (chosen_TE.T @ chosen_TE).double())
        norm_T, _ = sizes(x_TD)
        self._add("input_HC", _sum_at(norm_T, groups_T, self._subject.groups))
        peak = _max_at(norm_T, groups_T, self._subject.groups)
        self._add("input_peak_HC", peak, largest=True)

    def _add_router(
        self, logits_TE: Tensor, chosen_TE: Tensor, top_k: int, groups_T: Tensor
    ) -> None:
        """Distribution, entropy, and whether the top-k of the logits are chosen."""
        experts, groups = self._subject.experts, self._subject.groups
        p_TE = probabilities(logits_TE, self._subject.moe.routing)[:, :experts]
        p_TE = p_TE / p_TE.sum(-1, keepdim=True).clamp(min=1e-300)
        in_group_GT = torch.zeros(groups, len(p_TE), dtype=torch.float64, device=p_TE.device)
        in_group_GT.scatter_(0, groups_T[None], 1.0)
        self._add("probability_HCE", in_group_GT @ p_TE)
        self._add("entropy_HC", in_group_GT @ torch.special.entr(p_TE).sum(-1))
        top_TE = _chosen(logits_TE.topk(top_k, dim=-1, sorted=False).indices, self._rows)
        agree_T = (top_TE * chosen_TE)[:, :experts].sum(-1).double()
        self._add("agree_HC", in_group_GT @ agree_T)
        z_TE = logits_TE[:, :experts].double()
        self._add("logit_E", z_TE.sum(0))
        self._add("logit_EE", z_TE.T @ z_TE)
        self._routers_seen += 1

    def _take_sample(self, x_TD: Tensor, logits_TE: Tensor | None) -> None:
        """Keep what the experts were given for the tokens of the sample."""
        if self._layer.index_of_batch not in self._subject.sample:
            return
        places, slots = self._subject.sample[self._layer.index_of_batch]
        for name, table in (("inputs_SD", x_TD), ("logits_SE", logits_TE)):
            if table is None:
                continue
            if getattr(self, name) is None:
                setattr(self, name, torch.zeros(self._subject.sampled, table.shape[1]))
            getattr(self, name)[slots] = table[places.to(table.device)].float().cpu()

    def _add(self, name: str, more: Tensor, *, largest: bool = False) -> None:
        if name not in self._sums:
            self._sums[name] = more
        elif largest:
            self._sums[name] = torch.maximum(self._sums[name], more)
        else:
            self._sums[name] = self._sums[name] + more


def token_weight(h_TD: Tensor, y_TD: Tensor) -> Tensor:
    """EASY-EP's weight of each token, `max(1 − cos(h, h + y), 0)`, fp64 `[T]` (2504.06792).

    Args:
        h_TD: the residual stream before the experts.
        y_TD: what they add.
    """
    weight_T = torch.empty(len(h_TD), dtype=torch.float64, device=h_TD.device)
    step = max(1, _CACHED // h_TD.shape[-1])
    for start in range(0, len(h_TD), step):
        h = h_TD[start : start + step].double()
        after = h + y_TD[start : start + step]
        lengths = torch.linalg.vector_norm(h, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
        cosine = (h * after).sum(-1) / lengths.clamp(min=1e-300)
        weight_T[start : start + step] = (1 - cosine).clamp(min=0)
    return weight_T


def _sum_at(values: Tensor, place: Tensor, size: int) -> Tensor:
    """The values `[N, ...]` that share a place, summed; `[size, ...]`."""
    zeros = torch.zeros(size, *values.shape[1:], dtype=values.dtype, device=values.device)
    return zeros.index_add_(0, place, values)


def _max_at(values: Tensor, place: Tensor, size: int) -> Tensor:
    zeros = torch.zeros(size, dtype=values.dtype, device=values.device)
    return zeros.scatter_reduce(0, place, values, "amax")


def _chosen(ids_TK: Tensor, rows: int) -> Tensor:
    """1 for the experts chosen for each token, `[T, rows]`, fp32."""
    zeros = torch.zeros(len(ids_TK), rows, device=ids_TK.device)
    return zeros.scatter(1, ids_TK, 1.0)
