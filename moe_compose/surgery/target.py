"""The config of an upcycled checkpoint: the source's own JSON, its silent assumptions written out,
the MoE entries added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import Architecture, Twin, targets_of
from moe_compose.architectures.base import Key
from moe_compose.architectures.dialects import both_dialects
from moe_compose.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from moe_compose.surgery.upcycle_options import UpcycleOptions

#: Width of the silent shared expert that a family demands and a copy has no use for.
IDLE_SHARED_WIDTH = 32


def target_config(
    stated: Mapping[str, Any],
    dense: Architecture,
    form: Architecture,
    twin: Twin,
    options: UpcycleOptions,
) -> dict[str, Any]:
    """`config.json` of the result.

    Args:
        stated: the source's config, as `stated_config` gives it.
        dense: the source's form.
        form: the target's form.
        twin: how the two pair.
        options: of the upcycle.

    Raises:
        UnsupportedError: a width or a layer choice that the target cannot hold.
    """
    config = {k: v for k, v in stated.items() if k not in (*twin.drop, "auto_map")}
    config |= {"architectures": [form.hf_class], "model_type": form.model_type}
    if options.dtype is not None:
        config["dtype"] = options.dtype
    settings = {**form.spelled, **twin.config}
    if options.method == "shared":
        settings |= twin.shared_config
    if "unnormalised" in options.allow:
        settings |= twin.unnormalised_config
    for name, value in settings.items():
        Key(name=name).edit(config, value.get(stated) if isinstance(value, Key) else value)
    _experts(config, stated, dense, form, options)
    _layers(config, dense, form, options)
    both_dialects(config, form)
    return config


def _experts(
    config: dict[str, Any],
    stated: Mapping[str, Any],
    dense: Architecture,
    form: Architecture,
    options: UpcycleOptions,
) -> None:
    """Counts and widths. A family that needs a shared expert gets a small silent one where the
    method has no use for it.
    """
    width = dense.width.integer(stated)
    expert_width = width // options.granularity
    form.num_experts.edit(config, options.num_experts)
    form.top_k.edit(config, options.top_k)
    form.expert_width.edit(config, expert_width)
    if form.shared is None:
        return
    wanted = width if options.method == "shared" else 0
    if not wanted and not form.shared.optional:
        wanted = expert_width if form.shared.count else min(IDLE_SHARED_WIDTH, width)
    if form.shared.count is not None:
        form.shared.count.edit(config, wanted // expert_width)
    elif form.shared.width.name != form.expert_width.name:
        form.shared.width.edit(config, wanted)
    total = form.shared.total_width(config)
    if options.method == "shared" and total != width:
        raise UnsupportedError(
            f"the shared expert of {form.model_type} cannot have the FFN's width ({width}): "
            f"its config allows {total}",
            hint="Choose --granularity 1, or another method or target.",
        )


def _layers(
    config: dict[str, Any], dense: Architecture, form: Architecture, options: UpcycleOptions
) -> None:
    count = dense.layers.integer(config)
    chosen = choose_layers(options.layers, count)
    sparse = tuple(i in chosen for i in range(count))
    refusal = form.sparse.refusal(sparse)
    if refusal is None and not all(sparse) and form.mlp is None:
        refusal = "this family has no dense layers"
    if refusal:
        raise UnsupportedError(
            f"{form.model_type} cannot hold dense layers as --layers {options.layers} leaves them: "
            f"{refusal}",
            hint=f"Use --layers all, or a target that can: {_with_dense_layers(dense)}.",
        )
    form.sparse.edit(config, sparse)


def choose_layers(text: str, count: int) -> frozenset[int]:
    """The layers that `--layers` names: `all`, `every:N` (the last of each N), `A-B`, or numbers,
    joined by commas.

    Raises:
        OptionError: not of that form, out of range, or none.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        part = part.strip()
        if part == "all":
            chosen |= set(range(count))
        elif m := re.fullmatch(r"every:([1-9]\d*)", part):
            step = int(m[1])
            chosen |= set(range(step - 1, count, step))
        elif m := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            chosen |= set(range(int(m[1]), int(m[2] or m[1]) + 1))
        else:
            raise OptionError(
                f"layers ({text!r}) is none of: all, every:2, 4-11, 1,3,5 (counted from 0)"
            )
    if not chosen or max(chosen) >= count:
        raise OptionError(
            f"layers ({text!r}) must name at least one of the {count} layers, 0 to {count - 1}"
        )
    return frozenset(chosen)


def _with_dense_layers(dense: Architecture) -> str:
    """The dense family's targets that know dense layers, by name."""
    names = [a.model_type for a in targets_of(dense.model_type) if a.mlp]
    return ", ".join(names) or f"{dense.model_type} has none"
