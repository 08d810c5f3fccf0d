"""`config.json` after experts were selected: their count under all its names, what they are called,
and lists of modules of a quantised checkpoint that name experts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_compose.architectures import Architecture, all_architectures
from moe_compose.architectures.base import Key
from moe_compose.checkpoint.quantisation import ENTRIES
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.surgery.roles import NUMBERED, Roles

#: What quantised matrices are called: MXFP4; compressed-tensors; AWQ and GPTQ.
_PACKED = re.compile(r"(?P<stem>.+)(?:_blocks|\.weight_packed|\.qweight)")

#: What only a pattern has, and no name of a module.
_PATTERN = re.compile(r"^re:|[\\*\[\]()^$|+?]")


def with_count(config: Mapping[str, Any], form: Architecture, count: int) -> dict[str, Any]:
    """The config with another number of experts.

    Args:
        config: the source's.
        form: its family's.
        count: routed experts per layer.
    """
    keys = (f.num_experts for f in all_architectures().values() if f.is_moe)
    return _with(config, form.num_experts, keys, count)


def with_top_k(config: Mapping[str, Any], form: Architecture, top_k: int) -> dict[str, Any]:
    """The config with another number of experts per token.

    Args:
        config: the source's.
        form: its family's.
        top_k: experts that each token passes through.
    """
    keys = (f.top_k for f in all_architectures().values() if f.is_moe)
    return _with(config, form.top_k, keys, top_k)


def _with(
    config: Mapping[str, Any], key: Key, everywhere: Iterable[Key], value: int
) -> dict[str, Any]:
    """The config with another value of an entry, under every name that any family has for it and
    that is there with the old value.
    """
    edited: dict[str, Any] = copy.deepcopy(dict(config))
    before = key.get(config)
    after = [value] * len(before) if isinstance(before, list | tuple) else value
    if after == before:
        return edited
    key.edit(edited, after)
    for name in {n for other in everywhere for n in (other.name, *other.aliases)}:
        if edited.get(name) == before:
            edited[name] = after
    return edited


def without_mtp(config: dict[str, Any], form: Architecture) -> None:
    """Say in place that there are no layers of multi-token prediction."""
    present = [key for key in form.mtp_count if key.name in config]
    for key in present or form.mtp_count[:1]:
        key.edit(config, 0)


def packed_stems(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Names of what has packed values, in shapes of their own, in place of a matrix."""
    found = (_PACKED.fullmatch(name) for name in tensors)
    integers = {n for n, t in tensors.items() if t.dtype in ("U8", "I32")}
    packed = {m["stem"] for m in found if m}
    return packed | {n.removesuffix(".weight") for n in integers if n.endswith(".weight")}


def rename_modules(
    config: dict[str, Any], roles: Roles, blocks: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """Rewrite in place the names of experts in lists of what is, or is not, quantised.

    Args:
        config: of the result.
        roles: of the checkpoint's form.
        blocks: block → old ids of its experts, in their new order.

    Yields:
        Names that cannot be rewritten, and why.
    """
    problems: list[str] = []

    def renamed(text: str) -> list[str]:
        if _PATTERN.search(text):
            if re.search(r"experts?[^A-Za-z_]*\d", text):
                problems.append(f"{text!r} names experts by a pattern")
            return [text]
        if not NUMBERED.search(text):
            return [text]
        role = roles.of(text)
        ids = None if role is None or role.kind != "expert" else _ids(role.block, blocks)
        if role is None or ids is None:
            problems.append(f"{text!r} names an expert of no layer that has any")
            return [text]
        return [role.renamed(new) for new, old in enumerate(ids) if old == role.expert]

    def rewritten(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: rewritten(value) for old, value in node.items() for name in renamed(old)}
        if isinstance(node, list):
            parts = (renamed(x) if isinstance(x, str) else [rewritten(x)] for x in node)
            return [part for found in parts for part in found]
        return node

    for entry in ENTRIES:
        if entry in config:
            config[entry] = rewritten(config[entry])
    yield from problems


def _ids(named: str, blocks: Mapping[str, Sequence[int]]) -> Sequence[int] | None:
    """The selection of a block that a config names, with or without a prefix of its own."""
    for block, ids in blocks.items():
        if block == named or block.endswith(f".{named}") or named.endswith(f".{block}"):
            return ids
    return None
