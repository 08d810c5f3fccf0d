"""The config of a dense checkpoint that was part of an MoE: the MoE's own JSON without its experts.

A dense family says some things in other words than its MoE twin, assumes others where it is silent,
and has no words for some. So nothing is taken on trust: the config that was found is grown into an
MoE again, as `upcycle` would, and every entry that is not about experts or routing must come out as
it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from moe_compose.architectures import Architecture, Twin
from moe_compose.architectures.base import Key
from moe_compose.architectures.dialects import both_dialects, rope_per_layer_type
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.surgery.pairing import stated_config, unmet
from moe_compose.surgery.target import target_config
from moe_compose.surgery.upcycle_options import UpcycleOptions

#: Entries about experts and routers that no form names: losses, jitter, names.
_ABOUT_EXPERTS = re.compile(r"router|expert|^moe_")

#: Entries that change no logits, and need not be stated.
_TOKENS = frozenset(f"{word}_token_id" for word in ("bos", "eos", "pad"))


def dense_config(
    config: Mapping[str, Any],
    form: Architecture,
    dense: Architecture,
    twin: Twin,
    *,
    width: int,
    shown: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """`config.json` of a dense checkpoint that shares all but the experts with an MoE.

    Args:
        config: the MoE's.
        form: its form.
        dense: the form of the result.
        twin: how the two pair.
        width: of the result's FFN.
        shown: entries that the tensors show, for where the config is silent.

    Returns:
        The config, and what speaks against it: entries that the result cannot hold.
    """
    plain, left = _without_experts(config, form, dense, twin)
    plain |= {"architectures": [dense.hf_class], "model_type": dense.model_type}
    silent = {k: v for k, v in shown.items() if plain.get(k) is None and k in dense.facts}
    plain |= silent
    dense.width.edit(plain, width)
    refused: list[str] = []
    # of an entry that the twin drops nothing is left; where what the dense class assumes will not
    # do, one of these two may
    lost = [name for name in twin.drop if name not in config]
    for said in ({}, *({name: word} for name in lost for word in (False, True))):
        found = {**plain, **said}
        problems = list(_lost(found, left, {**config, **silent}, form, dense, twin, width))
        if not problems:
            both_dialects(found, dense)
            return found, []
        refused = refused or problems
    return plain, refused


def _without_experts(
    config: Mapping[str, Any], form: Architecture, dense: Architecture, twin: Twin
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The MoE's entries that a dense config keeps; and those that mean nothing in it."""
    settings = {**twin.config, **twin.shared_config, **twin.unnormalised_config}
    constants = {n for n, v in settings.items() if not (isinstance(v, Key) and v.name == n)}
    gone = {*_moe_entries(form), *constants, "auto_map"}
    plain = {k: v for k, v in config.items() if k not in gone and not _ABOUT_EXPERTS.search(k)}
    left = {k: plain.pop(k) for k in twin.drop if k in plain and k not in dense.facts}
    if rope_per_layer_type(plain) and not dense.per_layer_rope:
        first, *others = plain["rope_parameters"].values()
        if all(rope == first for rope in others):
            plain["rope_parameters"] = dict(first)
    if dense.model_type == form.model_type:  # without experts, the family is dense itself
        form.expert_width.edit(plain, form.expert_width.get(config))
        form.num_experts.edit(plain, 0)
        form.top_k.edit(plain, 0)
    return plain, left


def _moe_entries(form: Architecture) -> set[str]:
    """The entries that say how many experts there are, how wide, where, and how they are chosen."""
    keys: list[Any] = [form.num_experts, form.top_k, form.expert_width, *form.mtp_count]
    parts: tuple[Any, ...] = (form.shared, form.routing, form.sparse)
    for part in parts:
        keys += [getattr(part, f.name) for f in fields(part)] if part is not None else []
    return {n for k in keys if isinstance(k, Key) for n in (k.name, *k.aliases)}


def _lost(
    found: Mapping[str, Any],
    left: Mapping[str, Any],
    config: Mapping[str, Any],
    form: Architecture,
    dense: Architecture,
    twin: Twin,
    width: int,
) -> Iterator[str]:
    """What an MoE grown from the config that was found would say differently, in words."""
    moe = form.moe(config)
    options = UpcycleOptions(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        layers=",".join(map(str, moe.sparse_layers)),
    )
    try:
        stated = stated_config(found, dense)
        if (read := dense.width.integer(stated)) != width:
            yield f"{dense.width.name} would be read as {read}, not {width}"
        yield from unmet({**left, **stated}, dense, form)
        again = target_config(stated, dense, form, twin, options)
    except (CheckpointError, UnsupportedError) as error:
        yield error.message
        return
    known = {**form.spelled, **config}
    both_dialects(known, form)
    about_experts = {*_moe_entries(form), form.width.name, "architectures"}
    for name in (n for n in again if n not in about_experts):
        if name not in known:
            if name not in _TOKENS:
                yield f"{name} is not stated; {dense.model_type} would assume {again[name]!r}"
        elif known[name] != again[name]:
            yield f"{name} ({known[name]!r}) would become {again[name]!r}"
