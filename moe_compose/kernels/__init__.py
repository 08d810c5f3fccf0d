"""One MoE layer, run: Triton kernels where they can, torch's `grouped_mm` or plain torch elsewhere.

    choice.py           which of the three runs the experts, and why
    router.py           the router: the same choice, without `grouped_mm`
    grouped.py          the experts by torch's `grouped_mm`
    reference.py        plain torch, one expert after another: what all else is held to
    triton_forward.py   the forward; launch_*.py launch triton_*.py, which hold the kernels
    backward.py         the same with gradients; gradients.py says what makes which
    lora.py             low-rank additions to the experts
    configs.py          tile sizes by accelerator; tuned.py loads measured ones, tune.py measures
    selfcheck.py        a numeric check at first use, where compiling proves too little
    hook.py             the same as an experts implementation of transformers

Triton is imported when it is first used.

Example:
    >>> from moe_compose.kernels import ExpertLayout, ExpertWeights, moe_forward
    >>> import torch
    >>> E, D, F, T, k = 8, 64, 32, 100, 2
    >>> weights = ExpertWeights(gate_up=torch.randn(E, 2 * F, D), down=torch.randn(E, D, F))
    >>> experts, g = torch.randint(E, (T, k)), torch.rand(T, k)
    >>> moe_forward(torch.randn(T, D), weights, ExpertLayout(), experts, g).shape       # [T, D]
    torch.Size([100, 64])
"""

from moe_compose.kernels.choice import (
    Choice,
    Implementation,
    choose,
    moe_forward,
    moe_saliency,
)
from moe_compose.kernels.hook import register
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.router import route
from moe_compose.kernels.saliency import Saliency
from moe_compose.kernels.tuned import load_configs

__all__ = [
    "Choice",
    "ExpertLayout",
    "ExpertLora",
    "ExpertWeights",
    "Implementation",
    "Saliency",
    "choose",
    "load_configs",
    "moe_forward",
    "moe_saliency",
    "register",
    "route",
]
