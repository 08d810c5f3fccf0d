"""What is minimised. Losses are sums over the tokens of a sequence, in nats; padding never counts.

    lm        −ln p(next token)
    distill   KL(teacher ‖ student) of the next token's distribution, T = 1 (2603.02217)
    domain    −ln p(expert of the text's domain), p the router's probabilities, mean over layers

Shape suffixes: B sequences, S positions, T = B·S tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_compose.architectures.routing_form import Routing
from moe_compose.calibration.router import probabilities
from moe_compose.runtime.whole import Whole
from moe_compose.training.batches import Share
from moe_compose.training.routers import Seen


class Objective(Protocol):
    """What a forward pass is held to."""

    def counted(self, length: int) -> int:
        """How many tokens of a sequence have a loss: what sums are divided by."""

    def losses(self, logits_BSV: Tensor, share: Share, seen: Mapping[int, Seen]) -> Tensor:
        """The sum of each sequence, `[B]`, fp32 (fp64 for fp64 logits)."""


class NextToken:
    """`lm`."""

    def counted(self, length: int) -> int:
        """Every token but the last."""
        return length - 1

    def losses(self, logits_BSV: Tensor, share: Share, seen: Mapping[int, Seen]) -> Tensor:
        """−ln p(next token)."""
        ids_BS = share.ids_BS[:, 1:]
        logits_TV = _wide(logits_BSV[:, :-1]).flatten(0, 1)
        loss_T = torch.nn.functional.cross_entropy(logits_TV, ids_BS.flatten(), reduction="none")
        return (loss_T.view_as(ids_BS) * share.real_BS[:, 1:]).sum(-1)


@dataclass(frozen=True)
class Distill:
    """`distill`.

    Attributes:
        teacher: whole in memory beside the student.
    """

    teacher: Whole

    def counted(self, length: int) -> int:
        """Every token."""
        return length

    def losses(self, logits_BSV: Tensor, share: Share, seen: Mapping[int, Seen]) -> Tensor:
        """KL(teacher ‖ student)."""
        with torch.no_grad():
            wanted_BSV = _wide(share.run(self.teacher.model)).log_softmax(-1)
        mine_BSV = _wide(logits_BSV).log_softmax(-1)
        kl_BSV = torch.nn.functional.kl_div(mine_BSV, wanted_BSV, reduction="none", log_target=True)
        return (kl_BSV.sum(-1) * share.real_BS).sum(-1)


@dataclass(frozen=True)
class OwnDomain:
    """`domain`.

    Attributes:
        experts: domain → expert.
        routing: the scheme, which says what the router's probabilities are.
    """

    experts: Mapping[str, int]
    routing: Routing

    def counted(self, length: int) -> int:
        """Every token."""
        return length

    def losses(self, logits_BSV: Tensor, share: Share, seen: Mapping[int, Seen]) -> Tensor:
        """−ln p(expert of the text's domain), mean over layers."""
        experts = [self.experts[d] for d in share.domains]
        wanted_B1 = torch.tensor(experts, device=share.ids_BS.device)[:, None]
        wanted_T1 = wanted_B1.expand_as(share.ids_BS).flatten()[:, None]
        total_T = torch.stack(
            [
                -probabilities(one.logits_TE, self.routing).gather(-1, wanted_T1)[:, 0].log()
                for one in seen.values()
            ]
        ).mean(0)
        return (total_T.view_as(share.ids_BS) * share.real_BS).sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
