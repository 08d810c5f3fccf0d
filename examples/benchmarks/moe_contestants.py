"""What `moe_kernels.py` times: one layer of experts, run by several implementations.

Each contestant takes `(x, gate_up, down, ids, gates)`, with shapes `[T, D]`, `[E, 2F, D]`,
`[E, D, F]`, `[T, K]` twice, and returns `[T, D]`; or, where it cannot run here, is the reason in
words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_compose.kernels import ExpertLayout, ExpertWeights, Saliency, moe_forward
from moe_compose.kernels.tune import Shape, random_layer

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
LAYOUT = ExpertLayout()


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer."""

    name: str
    model: int
    width: int
    experts: int
    top_k: int


LAYERS = (
    Layer("Mixtral 8x7B", 4096, 14336, 8, 2),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Layer("DeepSeek-V3", 7168, 2048, 256, 8),
    Layer("OLMoE", 2048, 1024, 64, 8),
)
SMALL = (Layer("tiny", 64, 32, 4, 2),)


def draw(layer: Layer, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random arguments of a `Forward`; ids and gates of a random router, gates normalised."""
    shape = Shape(model=layer.model, width=layer.width, experts=layer.experts, top_k=layer.top_k)
    drawn = random_layer(shape, tokens, device, dtype)
    weights = drawn.weights
    return [drawn.x_TD, weights.gate_up, weights.down, drawn.experts_TK, drawn.weights_TK]


def ours(device: torch.device, saliency: Saliency | None = None) -> Forward:
    from moe_compose.kernels.triton_forward import INTERPRETED

    implementation = "triton" if device.type == "cuda" or INTERPRETED else "eager"

    def forward(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        weights = ExpertWeights(gate_up=gate_up, down=down)
        return moe_forward(
            x, weights, LAYOUT, ids, gates, saliency=saliency, implementation=implementation
        )

    return forward


def transformers_grouped_mm() -> Forward | str:
    try:
        from transformers import MixtralConfig
        from transformers.integrations.moe import grouped_mm_experts_forward
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        return str(error)

    def forward(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        sizes = {"hidden_size": 1, "intermediate_size": 1, "num_local_experts": len(down)}
        with torch.device("meta"):
            module = MixtralExperts(MixtralConfig(**sizes))
        del module.gate_up_proj, module.down_proj  # plain tensors, so that autograd sees ours
        module.gate_up_proj, module.down_proj = gate_up, down
        return grouped_mm_experts_forward(module, x, ids, gates.to(x.dtype))

    return forward


def liger() -> Forward | str:
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        return str(error)
    return lambda x, gate_up, down, ids, gates: LigerFusedMoEFunction.apply(
        x, gate_up, down, ids.int(), gates
    )


def dense(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """Two products of equal FLOPs with one expert's weights: another result, for its time only."""
    rows = x.repeat_interleave(ids.shape[1], 0)
    gate, up = functional.linear(rows, gate_up[0]).chunk(2, -1)
    y = functional.linear(functional.silu(gate) * up, down[0])
    return (y.unflatten(0, ids.shape) * gates[..., None].to(y.dtype)).sum(1)


def contestants(device: torch.device) -> dict[str, Forward | str]:
    """Name → how it runs here, or why it does not."""
    return {
        "moe-compose": ours(device),
        "transformers grouped_mm": transformers_grouped_mm(),
        "Liger fused_moe": liger() if device.type == "cuda" else "needs a GPU",
        "dense, equal FLOPs": dense,
    }
