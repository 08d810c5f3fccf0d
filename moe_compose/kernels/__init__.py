"""The experts of one MoE layer, run: Triton kernels where they can, the eager reference elsewhere.

    choice.py           which of the two, and why
    reference.py        plain torch, one expert after another: what all else is held to
    triton_forward.py   launches triton_sort.py, triton_products.py, triton_combine.py
    configs.py          tile sizes by accelerator
    hook.py             the same as an experts implementation of transformers

Triton is imported when it is first used. No gradients pass through the kernels yet.

Example:
    >>> from moe_compose.kernels import ExpertLayout, ExpertWeights, moe_forward
    >>> import torch
    >>> E, D, F, T, k = 8, 64, 32, 100, 2
    >>> weights = ExpertWeights(gate_up=torch.randn(E, 2 * F, D), down=torch.randn(E, D, F))
    >>> experts, g = torch.randint(E, (T, k)), torch.rand(T, k)
    >>> moe_forward(torch.randn(T, D), weights, ExpertLayout(), experts, g).shape       # [T, D]
    torch.Size([100, 64])
"""

from moe_compose.kernels.choice import Choice, Implementation, choose, moe_forward
from moe_compose.kernels.hook import register
from moe_compose.kernels.layout import ExpertLayout, ExpertWeights
from moe_compose.kernels.saliency import Saliency

__all__ = [
    "Choice",
    "ExpertLayout",
    "ExpertWeights",
    "Implementation",
    "Saliency",
    "choose",
    "moe_forward",
    "register",
]
