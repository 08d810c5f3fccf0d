"""How far a layer's routed output is off when experts are masked out of its router.

A masked expert is replaced: the next best takes its place, and the weights change. So without the
experts R, a token's output is off by

    y(R) − y = Σ_j g_j(R) f_j − Σ_j g_j f_j = Σ_j v_j f_j     j over what either routing chooses

with f_j = f_j(x). Its square is vᵀ G v with G = f fᵀ, and only G is kept: an expert runs once on
the tokens that may need it, and what follows is arithmetic.

Where weights are not renormalised, or groups are chosen first, masking an expert also changes what
tokens get that never chose it; all of them are counted then.

Shape suffixes: S tokens of the sample, N some of them, D model, E experts, Z rows of the router (E
and those of no FFN), K top-k, M experts that a token may need at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_compose.architectures import MoE
from moe_compose.calibration.pairs import Expert, rows_by_expert
from moe_compose.calibration.similarity import BLOCK
from moe_compose.routing import Routed, route


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedRouter:
    """A layer's routing by the reference, with experts out of reach.

    Attributes:
        moe: what the config says of it; its softcap is left to the logits.
        bias_Z: correction bias; None where there is none.
        scale_Z: learned scale of each expert's weight; None where there is none.
    """

    moe: MoE
    bias_Z: Tensor | None = None  # noqa: N815
    scale_Z: Tensor | None = None  # noqa: N815

    def __call__(self, logits_NZ: Tensor, gone: Sequence[int] = ()) -> Routed:
        """Weights, fp64, and experts `[N, K]` without the experts `gone`."""
        at = torch.tensor(list(gone), dtype=torch.int64)
        bias_Z = None if self.bias_Z is None else self.bias_Z.index_fill(0, at, -torch.inf)
        return route(
            logits_NZ.double().index_fill(1, at, -torch.inf),
            replace(self.moe.routing, softcap=None),
            self.moe.top_k,
            correction_bias_E=bias_Z,
            expert_scale_E=self.scale_Z,
        )

    def touched(self, routed: Routed, expert: int) -> Tensor:
        """Tokens that may be routed otherwise without one more expert, `[N]`.

        Args:
            routed: their routing so far.
            expert: which goes.
        """
        routing = self.moe.routing
        apart = routing.renormalise or routing.score not in ("softmax", "sparsemixer")
        if apart and not routing.grouped:
            return (routed.experts_TK == expert).any(1).nonzero().flatten()
        return torch.arange(len(routed.experts_TK))

    def each(self, logits_SZ: Tensor, whole: Routed) -> Iterator[tuple[Tensor, Routed]]:
        """For every expert, masked alone, the tokens that it may change, `[N]`, and their routing.

        Args:
            logits_SZ: of all tokens.
            whole: their routing with all experts.
        """
        for e in range(self.moe.num_experts):
            tokens_N = self.touched(whole, e)
            yield tokens_N, self(logits_SZ[tokens_N], [e])


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Tokens as one layer sees them, and what it makes of them unmasked.

    Attributes:
        router: the layer's.
        logits_SZ: its logits, on the CPU.
        whole: what it decides.
        gram_SMM: products of the outputs of the experts that a token may need.
        place_SZ: where an expert is among a token's.
    """

    router: MaskedRouter
    logits_SZ: Tensor  # noqa: N815
    whole: Routed
    gram_SMM: Tensor  # noqa: N815
    place_SZ: Tensor  # noqa: N815

    @classmethod
    def of(
        cls,
        router: MaskedRouter,
        logits_SZ: Tensor,
        run: Expert,
        ran: int,
        x_SD: Tensor,
        *,
        everything: bool,
    ) -> Sample:
        """Run the experts that may be needed.

        Args:
            router: the layer's.
            logits_SZ: its logits, on the CPU.
            run: one expert on some rows.
            ran: ids below are run; others return nothing.
            x_SD: what the experts are given.
            everything: all experts may be needed; otherwise those chosen when one is masked.
        """
        whole = router(logits_SZ)
        needed_SZ = torch.full(logits_SZ.shape, everything)
        if not everything:
            needed_SZ.scatter_(1, whole.experts_TK, True)
            for tokens_N, masked in router.each(logits_SZ, whole):
                needed_SZ[tokens_N[:, None], masked.experts_TK] = True
        gram_SMM, place_SZ = _products(run, ran, x_SD, needed_SZ)
        return cls(
            router=router, logits_SZ=logits_SZ, whole=whole, gram_SMM=gram_SMM, place_SZ=place_SZ
        )

    def part(self, wanted_S: Tensor) -> Sample:
        """Some of the tokens."""
        return replace(
            self,
            logits_SZ=self.logits_SZ[wanted_S],
            whole=Routed(*(t[wanted_S] for t in self.whole)),
            gram_SMM=self.gram_SMM[wanted_S],
            place_SZ=self.place_SZ[wanted_S],
        )

    def error(self, tokens_N: Tensor, masked: Routed) -> Tensor:
        """`‖y(R) − y‖²` of tokens whose masked routing is given, `[N]`."""
        old = Routed(*(t[tokens_N] for t in self.whole))
        v_NV = torch.cat([masked.weights_TK, -old.weights_TK], 1)
        at_NV = torch.cat([masked.experts_TK, old.experts_TK], 1)
        at_NV = self.place_SZ[tokens_N[:, None], at_NV]
        gram_NVV = self.gram_SMM[tokens_N[:, None, None], at_NV[:, :, None], at_NV[:, None, :]]
        return torch.einsum("ni,nij,nj->n", v_NV, gram_NVV, v_NV).clamp(min=0)


def removal_steps(sample: Sample) -> Tensor:
    """In which step each expert goes, `[E]`, fp64, when the one without which the layer is least
    off goes again and again; of equals the higher id. Those that the router cannot do without go
    last, together.

    Where the router chooses groups first, every group loses its n-th expert before any loses
    another.
    """
    moe = sample.router.moe
    masked, error_S = sample.whole, torch.zeros(len(sample.logits_SZ), dtype=torch.float64)
    gone: list[int] = []
    while candidates := _candidates(moe, gone):
        found = {}
        for e in candidates:
            tokens_N = sample.router.touched(masked, e)
            routed = sample.router(sample.logits_SZ[tokens_N], [*gone, e])
            found[e] = tokens_N, routed, sample.error(tokens_N, routed)
        more = {e: float((new - error_S[at]).sum()) for e, (at, _, new) in found.items()}
        first = min(candidates, key=lambda e: (more[e], -e))
        at, routed, new = found[first]
        error_S = error_S.index_copy(0, at, new)
        masked = Routed(
            masked.weights_TK.index_copy(0, at, routed.weights_TK),
            masked.experts_TK.index_copy(0, at, routed.experts_TK),
        )
        gone.append(first)
    steps = torch.full((moe.num_experts,), float(len(gone)), dtype=torch.float64)
    steps[gone] = torch.arange(len(gone), dtype=torch.float64)
    return steps


def _candidates(moe: MoE, gone: Sequence[int]) -> list[int]:
    """Experts that may go next: of the fullest groups, while the router can do without."""
    routing = moe.routing
    groups, least = 1, moe.top_k
    if routing.grouped:
        groups = routing.groups
        least = max(-(-moe.top_k // routing.top_groups), 2 if routing.group_score == "top2" else 1)
    size = moe.num_experts // groups
    left = [[e for e in range(g * size, g * size + size) if e not in gone] for g in range(groups)]
    most = max(map(len, left))
    return [e for group in left if len(group) == most > least for e in group]


def _products(run: Expert, ran: int, x_SD: Tensor, needed_SZ: Tensor) -> tuple[Tensor, Tensor]:
    """`G`, and each expert's place in it, a block of tokens at a time."""
    place_SZ = needed_SZ.long().cumsum(1) - 1
    most, width = int(needed_SZ.sum(1).max()), x_SD.shape[1]
    ids_SM = torch.full((len(x_SD), most), -1)
    tokens, ids = needed_SZ.nonzero(as_tuple=True)
    ids_SM[tokens, place_SZ[tokens, ids]] = ids
    gram_SMM = torch.empty(len(x_SD), most, most, dtype=torch.float64)
    step = max(1, BLOCK // (8 * most * width))
    for start in range(0, len(x_SD), step):
        x_ND = x_SD[start : start + step]
        ids_NM = ids_SM[start : start + step].to(x_ND.device)
        f = torch.zeros(ids_NM.numel(), width, dtype=torch.float64, device=x_ND.device)
        for e, rows in rows_by_expert(ids_NM, ran):
            f[rows] = run(e, x_ND[rows // most]).double()
        f_NMD = f.view(len(x_ND), most, width)
        gram_SMM[start : start + step] = (f_NMD @ f_NMD.mT).cpu()
    return gram_SMM, place_SZ
