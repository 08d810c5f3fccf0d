"""The experts by torch's `grouped_mm`: where Triton cannot run them, and as a cross-check of it.

Pairs are sorted by expert, and each product is one call for all experts. The activation, the biases
and the weighted sum are plain torch, so z, h and y are written out and read again in between, which
the kernels spare. Differentiable in everything; asks the device for nothing, except where torch's
own `grouped_mm` does (outside bf16, and before Hopper).

Rows behind the last expert's, of ids outside `0..E-1`, are left as they were in fresh memory by
`grouped_mm`, in the forward and in its gradient. They are set to 0 after each product.

Shape suffixes: T tokens, D model, F expert width, E experts, K top-k, P pairs = T·K, O outputs and
I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_compose.kernels.layout import ExpertLayout, ExpertWeights, check
from moe_compose.kernels.lora import ExpertLora
from moe_compose.kernels.reference import activate
from moe_compose.kernels.saliency import Saliency

#: Tokens that `moe_saliency` holds the outputs of at a time.
_TOKENS = 1024

#: `grouped_mm` wants addresses, and strides of rows, that are multiples of so many bytes.
_ALIGNED = 16


def obstacle(
    x_TD: Tensor,
    weights: ExpertWeights,
    *,
    dtype: torch.dtype | None = None,
    lora: ExpertLora | None = None,
) -> str:
    """Why `grouped_mm` cannot run these tensors; empty if it can."""
    function, dtypes = _function()
    given = (*weights.tensors, *(() if lora is None else lora.tensors))
    if function is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if torch.float64 in (dtype, x_TD.dtype):
        return "fp64 is for the reference"
    if x_TD.dtype not in dtypes:
        return f"grouped_mm does not take {x_TD.dtype}"
    other = {t.dtype for t in given} - {x_TD.dtype}
    if other:
        return f"tokens are {x_TD.dtype} and experts {other.pop()}"
    if x_TD.device.type not in ("cpu", "cuda"):
        return f"grouped_mm was not tried on {x_TD.device.type}"
    if x_TD.device.type == "cuda" and torch.cuda.get_device_capability(x_TD.device) < (8, 0):
        return "grouped_mm needs compute capability 8.0"
    crooked = next((t for t in given if t.dim() == 3 and not _is_aligned(t)), None)
    if crooked is None:
        return ""
    multiple = _ALIGNED // x_TD.element_size()
    sizes = " × ".join(map(str, crooked.shape[1:]))
    return f"grouped_mm needs multiples of {multiple} elements, and a matrix is {sizes}"


def moe_forward(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    dtype: torch.dtype | None = None,
    saliency: Saliency | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """The reference's `moe_forward`, in two products for all experts.

    Takes what `obstacle` has nothing against. `dtype` is that of the result only: products are in
    the dtype of `x_TD`.

    Raises:
        OptionError: shapes that don't fit.
    """
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency, lora)
    if not experts_TK.numel():
        return x_TD.new_zeros(x_TD.shape, dtype=dtype)
    order = _sort(experts_TK, weights.experts)
    f_PD = _outputs(x_TD, weights, layout, order, lora)
    if saliency is not None:
        _add(saliency, f_PD, weights_TK, order)
    f_TKD = f_PD[order.slot_P].view(*experts_TK.shape, -1)
    g_TK = weights_TK.float().masked_fill(order.dropped_P1[order.slot_P].view_as(weights_TK), 0)
    return (g_TK.unsqueeze(-1) * f_TKD).sum(1).to(dtype or x_TD.dtype)


@torch.no_grad()
def moe_saliency(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    experts_TK: Tensor,
    weights_TK: Tensor,
    saliency: Saliency,
    *,
    lora: ExpertLora | None = None,
) -> None:
    """The saliency of a `moe_forward` whose output nobody wants, a few tokens at a time.

    Raises:
        OptionError: shapes that don't fit.
    """
    check(x_TD, weights, layout, experts_TK, weights_TK, saliency, lora)
    for start in range(0, len(x_TD) if experts_TK.numel() else 0, _TOKENS):
        some = slice(start, start + _TOKENS)
        order = _sort(experts_TK[some], weights.experts)
        _add(saliency, _outputs(x_TD[some], weights, layout, order, lora), weights_TK[some], order)


class _Order(NamedTuple):
    """Pairs in the order of their experts, the dropped ones last.

    Attributes:
        pair_P, slot_P: which pair is in a slot, and which slot a pair is in.
        expert_P: of every slot; E − 1 for dropped ones.
        dropped_P1: which slots those are.
        ends_E: the slot behind each expert's last; int32.
        top_k: K.
    """

    pair_P: Tensor  # noqa: N815
    slot_P: Tensor  # noqa: N815
    expert_P: Tensor  # noqa: N815
    dropped_P1: Tensor  # noqa: N815
    ends_E: Tensor  # noqa: N815
    top_k: int


def _sort(experts_TK: Tensor, experts: int) -> _Order:
    ids_P = experts_TK.flatten().long()
    ids_P = torch.where((ids_P < 0) | (ids_P > experts), experts, ids_P)
    sorted_P, pair_P = torch.sort(ids_P, stable=True)
    slot_P = torch.empty_like(pair_P)
    slot_P[pair_P] = torch.arange(len(pair_P), device=pair_P.device)
    every_E = torch.arange(experts, device=ids_P.device)
    return _Order(
        pair_P,
        slot_P,
        sorted_P.clamp(max=experts - 1),
        (sorted_P == experts).unsqueeze(-1),
        torch.searchsorted(sorted_P, every_E, right=True).int(),
        experts_TK.shape[1],
    )


def _outputs(
    x_TD: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    order: _Order,
    lora: ExpertLora | None,
) -> Tensor:
    """Of every slot's expert, before the router's weight; 0 in dropped ones, `[P, D]`."""
    x_PD = x_TD[order.pair_P // order.top_k].masked_fill(order.dropped_P1, 0)
    z_PP = _linear(x_PD, _oriented(weights.gate_up, layout), weights.gate_up_bias, order)
    if lora is not None and lora.gate_up_a is not None and lora.gate_up_b is not None:
        u_PR = lora.scale * _linear(x_PD, lora.gate_up_a, None, order)
        z_PP = z_PP + _linear(u_PR, lora.gate_up_b, None, order)
    h_PF = activate(z_PP, layout)
    y_PD = _linear(h_PF, _oriented(weights.down, layout), weights.down_bias, order)
    if lora is not None and lora.down_a is not None and lora.down_b is not None:
        u_PR = lora.scale * _linear(h_PF, lora.down_a, None, order)
        y_PD = y_PD + _linear(u_PR, lora.down_b, None, order)
    return y_PD


def _oriented(matrix: Tensor, layout: ExpertLayout) -> Tensor:
    """`[E, out, in]`."""
    return matrix.mT if layout.transposed else matrix


def _linear(x_PI: Tensor, matrix_EOI: Tensor, bias_EO: Tensor | None, order: _Order) -> Tensor:
    """Each slot by its expert's matrix, `[P, O]`."""
    function, _ = _function()
    assert function is not None, "obstacle() was not asked"
    y_PO: Tensor = function(x_PI, matrix_EOI.mT, offs=order.ends_E)
    if bias_EO is not None:
        y_PO = y_PO + bias_EO[order.expert_P]
    return y_PO.masked_fill(order.dropped_P1, 0)


def _add(saliency: Saliency, f_PD: Tensor, weights_TK: Tensor, order: _Order) -> None:
    """Sum over each expert's slots, in order."""
    norm_P = torch.linalg.vector_norm(f_PD.detach(), dim=-1, dtype=torch.float64)
    gate_P = weights_TK.detach().flatten()[order.pair_P].double()
    columns = (torch.ones_like(norm_P), gate_P, norm_P, norm_P.square(), gate_P * norm_P)
    ends_E = order.ends_E.long()
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    counts_E = torch.cat([ends_E - starts_E, len(norm_P) - ends_E[-1:]])  # the dropped last
    sums: dict[str, Any] = {"lengths": counts_E, "unsafe": True, "initial": 0.0}
    added_E5 = torch.segment_reduce(torch.stack(columns, -1), "sum", **sums)[:-1]
    largest_E = torch.segment_reduce(norm_P, "max", **sums)[:-1]
    saliency.table_6E[:5] += added_E5.T
    saliency.table_6E[5] = torch.maximum(saliency.table_6E[5], largest_E)


def _function() -> tuple[Callable[..., Tensor] | None, tuple[torch.dtype, ...]]:
    """torch's `grouped_mm` and the dtypes it takes; torch 2.9 has it under another name."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    if public is not None:
        return public, (torch.bfloat16, torch.float16, torch.float32)
    return getattr(torch, "_grouped_mm", None), (torch.bfloat16,)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether rows of the matrix, of the other operand and of every gradient begin where
    `grouped_mm` can read them."""
    size = matrix.element_size()
    strides = sorted(matrix.stride()[1:])
    return (
        strides[0] == 1
        and all(n * size % _ALIGNED == 0 for n in (matrix.stride(0), strides[1], *matrix.shape[1:]))
        and matrix.data_ptr() % _ALIGNED == 0
    )
