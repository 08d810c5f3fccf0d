"""`Twin`: how a dense family's checkpoint becomes one of an MoE family with the same mathematics
around the FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_compose.architectures.base import Key


@dataclass(frozen=True, kw_only=True)
class Require:
    """A fact of the source that the target has no home for unless it has one of these values.

    Attributes:
        key: the source's config entry.
        allowed: values under which the pair is exact; of a list, every entry must be one of them.
        reason: what the target does instead; completes "X has no home in the target: ...".
    """

    key: Key
    allowed: tuple[Any, ...]
    reason: str

    def broken_by(self, config: Mapping[str, Any]) -> str | None:
        """What stands in the way, in words; None when the config meets the requirement."""
        value = self.key.get(config)
        found = value if isinstance(value, list | tuple) else [value]
        if all(v in self.allowed for v in found):
            return None
        return f"{self.key.name} ({value!r}) has no home in the target: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A fused source tensor whose consecutive row blocks become several target tensors (Phi-3's
    `qkv_proj`).

    Attributes:
        source: template of the fused tensor.
        parts: (target template, row count), the count as a product of config keys: each a tuple of
    `Key`s.
    """

    source: str
    parts: tuple[tuple[str, tuple[Key, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """A target tensor that the source lacks and that a constant makes neutral (a zero bias).

    Attributes:
        name: target template (with `{i}` for one per layer).
        shape: each dimension as a product of config keys of the target.
        value: the constant.
        dtype: stored so; None takes the checkpoint's dtype.
        sparse_only: only in sparse layers.
    """

    name: str
    shape: tuple[tuple[Key, ...], ...]
    value: float = 0.0
    dtype: str | None = None
    sparse_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Twin:
    """How a dense family's checkpoint becomes one of an MoE family with the same mathematics around
    the FFN.

    Attributes:
        dense: `model_type` of the source.
        config: entries set in the target: a constant, or a `Key` read from the source (with its
            default).
        shared_config: entries on top of those when the dense FFN becomes the shared expert.
        unnormalised_config: entries on top under which the k weights are not renormalised; empty
            where the target has no such variant.
        drop: source entries that mean nothing, or something else, in the target.
        requires: facts without which the pair is not exact.
        renames: source template → target template, for non-FFN tensors whose names differ.
        copies: source template → template of a second tensor in the target that starts equal (a
            norm that the experts get for themselves).
        splits: fused tensors that the target stores apart.
        interleave: templates of q and k projections whose rows change from half-split to
            interleaved rotary order (ERNIE).
        fills: constant tensors that the target adds.
        accuracy: relative fp32 error of the logits that the pair reaches when it is exact in
            mathematics; larger than 1e-6 where the two families' code orders its operations
            differently.
    """

    dense: str
    config: Mapping[str, Any] = field(default_factory=dict)
    shared_config: Mapping[str, Any] = field(default_factory=dict)
    unnormalised_config: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    requires: tuple[Require, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()
    interleave: tuple[str, ...] = ()
    fills: tuple[Fill, ...] = ()
    accuracy: float = 1e-6
