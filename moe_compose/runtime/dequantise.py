"""A quantised checkpoint as the plain one it stands for, tensor by tensor, when they are read.

    FP8                W[r, c] = weight[r, c] · scale, one for the tensor, a row, a block; it is
                       called weight_scale_inv, weight_scale (ModelOpt, FBGEMM, Quark) or scale
    MXFP4              W[e, c, r] = E2M1[half byte c of blocks[e, r]] · 2^(s[e, r, c // 32] − 127)
    compressed-tensors W[r, c] = (field c of weight_packed[r] − 2^(bits − 1)) · scale[r, c // group]
                       W[r, c] = weight[r, c] · weight_scale, one for the tensor, a row, a block

Products are taken in fp32, or in fp64 for fp64, and rounded once. What has no scales beside it is
plain already. Other formats are refused, and so is a checkpoint with packed values, or with scales,
that nothing here decodes: without them it would run, and be another model. Scales of activations
are left out: activations are not rounded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moe_compose.architectures import find
from moe_compose.architectures.parts import Locator
from moe_compose.checkpoint.quantisation import ENTRIES, SIDE_FILE, stated_quantisation
from moe_compose.checkpoint.source import FLOAT_DTYPES, Extent, TensorInfo, TensorSource
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.surgery.roles import Roles

#: Dtypes in which values are codes: without a scale they mean nothing.
_CODES = frozenset(
    ("I8", "U8", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
)

#: Of these, what is a number times its scale.
_EIGHT = frozenset(dtype for dtype in _CODES if dtype.startswith("F8"))

#: What the scale of a tensor is called.
_SCALES = ("{name}_scale_inv", "{name}_scale", "{name}_weight_scale", "{stem}.scale")

#: Parts of quantised matrices, whatever their dtype.
_PARTS = re.compile(
    r".+[._](qweight|qzeros|weight_packed|weight_scale(_inv|_2)?|weight_(global_scale|zero_point))"
)

#: Scales that weights do not depend on.
_OF_ACTIVATIONS = re.compile(
    r".*[._](input|activation|output|[qkv]|kv|kv_cache|prob)"
    r"_(scale(_ub|_inv)?|global_scale|scaling_factor|zero_point)"
)

#: Faults that are listed one by one.
_SHOWN = 5

_HINT = "Dequantise the checkpoint first, with the tool that made it."

#: The sixteen values of E2M1, the sign being the highest bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: Values per scale in MXFP4.
_GROUP = 32

#: Formats of compressed-tensors whose weights lie one by one beside their scales.
_PLAIN = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class _Folded:
    """A tensor that is made of several: its shape, how it is read, and of what."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    parts: tuple[str, ...]


class Dequantised:
    """A `TensorSource` of plain tensors over a quantised one. Made by `dequantised`."""

    def __init__(
        self,
        source: TensorSource,
        config: Mapping[str, Any],
        dtype: str,
        folded: dict[str, _Folded],
    ) -> None:
        self._source, self._folded, self._dtype = source, folded, getattr(torch, dtype)
        self.config = config
        name_on_disk = next(n for n, torch_name in FLOAT_DTYPES.items() if torch_name == dtype)
        parts = {part for f in folded.values() for part in f.parts}
        plain = {n: t for n, t in source.tensors.items() if n not in parts}
        made = {n: TensorInfo.of(n, name_on_disk, f.shape) for n, f in folded.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(plain | made)

    @property
    def files(self) -> Mapping[str, Path]:
        return self._source.files

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self._source.weight_files

    @property
    def label(self) -> str:
        return self._source.label

    def digest(self) -> str:
        return self._source.digest()

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        return None if name in self._folded else self._source.extents(name)

    def stream(self, name: str) -> Iterator[Tensor]:
        yield self.read(name).reshape(-1)

    def read(self, name: str) -> Tensor:
        if name not in self._folded:
            return self._source.read(name)
        found: Tensor = self._folded[name].read()
        return found


def dequantised(source: TensorSource, dtype: str) -> TensorSource:
    """The source itself where it is not quantised; else one of plain tensors.

    Args:
        source: a checkpoint or a plan.
        dtype: what quantised tensors become (`float32`, `bfloat16`, ...).

    Raises:
        UnsupportedError: quantised in a way that is not known here, or only in part: packed values
            or scales that nothing decodes.
    """
    stated = stated_quantisation(source)
    folded: dict[str, _Folded] = {}
    if stated is not None:
        method = stated.get("quant_method")
        if method not in _FOLDERS:
            raise UnsupportedError(
                f"{source.label} is quantised by {method!r}, which cannot be run here",
                hint=f"Known are {', '.join(_FOLDERS)}. {_HINT}",
            )
        folded = _FOLDERS[method](source, stated, getattr(torch, dtype))
    if left := list(_left_over(source, folded)):
        more = len(left) - _SHOWN
        raise UnsupportedError(
            f"{source.label} holds quantised values that cannot be run here",
            problems=[*left[:_SHOWN], *([f"and {more} more"] if more > 0 else [])],
            hint=_HINT
            if stated
            else f"Neither config.json nor {SIDE_FILE} says how to read them. {_HINT}",
        )
    if stated is None:
        return source
    config = {k: v for k, v in source.config.items() if k not in ENTRIES}
    return Dequantised(source, config, dtype, folded)


def refuse_lost_scales(source: TensorSource, unused: Iterable[str]) -> None:
    """Refuse a checkpoint with a scale that its class has no use for.

    Args:
        source: dequantised.
        unused: names that the class does not take.

    Raises:
        UnsupportedError: a scale of weights is among them.
    """
    outside = _outside_of_layers(source)
    lost = [
        n
        for n in unused
        if "scale" in n.rpartition(".")[2] and not _OF_ACTIVATIONS.fullmatch(n) and not outside(n)
    ]
    if lost:
        more = len(lost) - _SHOWN
        raise UnsupportedError(
            f"{source.label} has scales that its class does not use",
            problems=[*lost[:_SHOWN], *([f"and {more} more"] if more > 0 else [])],
            hint=_HINT,
        )


def _left_over(source: TensorSource, folded: Mapping[str, _Folded]) -> Iterator[str]:
    """What is neither plain nor made plain, and why that is known."""
    form = find(source.config)
    parts = {part for f in folded.values() for part in f.parts}
    outside = _outside_of_layers(source)
    roles = Roles(form) if form is not None and form.experts is not None else None

    def is_table(name: str) -> bool:
        role = roles.of(name) if roles is not None else None
        return role is not None and role.router is not None and role.router.kind == "table"

    for name, info in source.tensors.items():
        if name in parts or _OF_ACTIVATIONS.fullmatch(name) or outside(name) or is_table(name):
            continue
        if info.dtype in _CODES:
            yield f"{name} is {info.dtype}"
        elif _PARTS.fullmatch(name):
            yield f"{name} is a part of a quantised matrix"
        elif name.endswith((".scale", ".scales")):
            weight = source.tensors.get(f"{name.rpartition('.')[0]}.weight")
            if weight is not None and len(weight.shape) > 1:
                yield f"{name} scales {weight.name}"


def _outside_of_layers(source: TensorSource) -> Callable[[str], bool]:
    """Whether a name is of multi-token prediction, which is never run."""
    form = find(source.config)
    if form is None or not form.mtp:
        return lambda name: False
    locator = Locator(form, form.layers.integer(source.config))
    return lambda name: locator.place(name).kind == "MTP"


def _fp8(source: TensorSource, stated: Mapping[str, Any], dtype: torch.dtype) -> dict[str, _Folded]:
    return _scaled(source, stated.get("weight_block_size"), dtype, _EIGHT)


def _compressed(
    source: TensorSource, stated: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, _Folded]:
    kind = stated.get("format")
    groups = [g for g in (stated.get("config_groups") or {}).values() if g.get("weights")]
    weights = [g["weights"] for g in groups]
    kinds = {g.get("format") or kind for g in groups} or {kind}
    bits = {w.get("num_bits") for w in weights}
    if any(not w.get("symmetric", True) for w in weights):
        raise UnsupportedError(f"{source.label}: weights with zero points cannot be run here")
    if kinds <= set(_PLAIN):
        block = next((w["block_structure"] for w in weights if w.get("block_structure")), None)
        return _scaled(source, block, dtype, _EIGHT | {"I8"})
    if kinds != {"pack-quantized"} or len(bits) != 1 or not bits <= {4, 8}:
        raise UnsupportedError(
            f"{source.label}: compressed-tensors in {sorted(map(str, kinds))} with "
            f"{sorted(map(str, bits))} bits cannot be run here",
            hint="Known are pack-quantized in 4 or 8 bits, float-quantized and int-quantized.",
        )
    return _packed(source, bits.pop(), dtype)


def _scaled(
    source: TensorSource, block: list[int] | None, dtype: torch.dtype, dtypes: Collection[str]
) -> dict[str, _Folded]:
    """Numbers of one byte that have a scale beside them."""
    found = {}
    for name, info in source.tensors.items():
        if info.dtype not in dtypes:
            continue
        stem = name.removesuffix(".weight")
        scales = (template.format(name=name, stem=stem) for template in _SCALES)
        scale = next((n for n in scales if n in source.tensors), None)
        if scale is not None:
            read = partial(_read_scaled, source, name, scale, block, dtype)
            found[name] = _Folded(info.shape, read, (name, scale))
    return found


def _packed(source: TensorSource, bits: int, dtype: torch.dtype) -> dict[str, _Folded]:
    found = {}
    for name, info in source.tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        stem = name.removesuffix("_packed")
        if f"{stem}_g_idx" in source.tensors:
            raise UnsupportedError(f"{stem}: columns in an order of their own cannot be run here")
        *rows, columns = info.shape
        shape = (*rows, columns * (32 // bits))
        read = partial(_read_packed, source, stem, bits, dtype)
        found[stem] = _Folded(shape, read, (name, f"{stem}_scale"))
    return found


def _mxfp4(
    source: TensorSource, stated: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, _Folded]:
    found = {}
    for name, info in source.tensors.items():
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in source.tensors:
            experts, rows, groups, _ = info.shape
            shape = (experts, groups * _GROUP, rows)
            read = partial(_read_mxfp4, source, stem, dtype)
            found[stem] = _Folded(shape, read, (name, f"{stem}_scales"))
    return found


#: Method, as a config names it → how its matrices are made plain.
_FOLDERS = {
    **dict.fromkeys(("fp8", "fbgemm_fp8", "modelopt", "quark"), _fp8),
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _exponents(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as numbers: bytes are exponents, offset by 127."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scales, dtype=dtype), scales.to(torch.int32) - 127)
    return scales.to(dtype)


def _read_scaled(
    source: TensorSource, name: str, scale: str, block: list[int] | None, dtype: torch.dtype
) -> Tensor:
    """`weight · scale`, the scale repeated over rows and columns of its block.

    Args:
        source: the quantised source.
        name: of the weight, `[..., R, C]`.
        scale: name of its scales: of one number, `[R]`, `[E]` for a weight `[E, R, C]`, or
            `[..., ⌈R / rows⌉, ⌈C / columns⌉]`.
        block: rows and columns that share a scale; None for what the shapes say.
        dtype: of the result.
    """
    weight, scales = source.read(name), _exponents(source.read(scale), _wide(dtype))
    if scales.numel() == 1:
        return (weight.to(scales.dtype) * scales.reshape(())).to(dtype)
    if scales.ndim == 1:
        scales = scales.reshape(-1, *[1] * (weight.ndim - 1))
    if scales.shape[:-2] != weight.shape[:-2]:
        raise _not_covered(name, scales.shape, weight.shape)
    size = _block_size(weight.shape, scales.shape, block, name)
    result = torch.empty(weight.shape, dtype=dtype)
    matrices = (t.reshape(-1, *t.shape[-2:]) for t in (weight, scales, result))
    for w_RC, s, out in zip(*matrices, strict=True):
        for i, row in enumerate(s):
            at = slice(i * size[0], (i + 1) * size[0])
            factors = row.repeat_interleave(size[1])[: w_RC.shape[1]]
            out[at] = (w_RC[at].to(s.dtype) * factors).to(dtype)
    return result


def _block_size(
    weight: torch.Size, scales: torch.Size, block: list[int] | None, name: str
) -> tuple[int, int]:
    """Rows and columns that share a scale: as stated where that fits, else whole fractions."""
    for size in (block, [weight[d] // scales[d] for d in (-2, -1)]):
        if size and all(
            n > 0 and -(-w // n) == s
            for w, n, s in zip(weight[-2:], size, scales[-2:], strict=True)
        ):
            return size[0], size[1]
    raise _not_covered(name, scales, weight)


def _not_covered(name: str, scales: torch.Size, weight: torch.Size) -> CheckpointError:
    return CheckpointError(
        f"{name}: scales of shape {list(scales)} do not cover a weight of shape {list(weight)}"
    )


def _read_packed(source: TensorSource, stem: str, bits: int, dtype: torch.dtype) -> Tensor:
    """Integers, `32 / bits` in each int32, the lowest bits first, offset by half their range; times
    a scale for each row and group of columns.
    """
    packed, scales = source.read(f"{stem}_packed"), source.read(f"{stem}_scale").to(_wide(dtype))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    whole_RC = (packed[..., None] >> shifts & (1 << bits) - 1).flatten(-2) - (1 << bits - 1)
    columns = whole_RC.shape[-1]
    if scales.shape[:-1] != whole_RC.shape[:-1] or columns % scales.shape[-1]:
        raise CheckpointError(
            f"{stem}: scales of shape {list(scales.shape)} do not cover {list(whole_RC.shape)}"
        )
    grouped = whole_RC.reshape(*scales.shape, -1).to(scales.dtype)
    result: Tensor = (grouped * scales[..., None]).flatten(-2).to(dtype)
    return result


def _read_mxfp4(source: TensorSource, stem: str, dtype: torch.dtype) -> Tensor:
    """`[E, R, G, 16]` bytes, the low half first, and `[E, R, G]` exponents → `[E, 32·G, R]`."""
    blocks, scales = source.read(f"{stem}_blocks"), source.read(f"{stem}_scales")
    experts, rows, groups, half = blocks.shape
    if scales.shape != blocks.shape[:-1] or half * 2 != _GROUP:
        raise CheckpointError(
            f"{stem}: blocks {list(blocks.shape)} and scales {list(scales.shape)} do not fit"
        )
    values = torch.tensor(_E2M1, dtype=_wide(dtype))
    result = torch.empty((experts, groups * _GROUP, rows), dtype=dtype)
    for e in range(experts):
        halves = torch.stack((blocks[e] & 15, blocks[e] >> 4), dim=-1)
        numbers = values[halves.reshape(rows, groups, _GROUP).int()]
        numbers = torch.ldexp(numbers, scales[e, ..., None].int() - 127)
        result[e] = numbers.reshape(rows, groups * _GROUP).mT.to(dtype)
    return result
