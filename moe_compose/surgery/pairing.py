"""Which MoE family a dense checkpoint can become without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compose.architectures import Architecture, Twin, all_architectures, find, targets_of
from moe_compose.architectures.dialects import both_dialects, rope_per_layer_type, state_facts
from moe_compose.architectures.refused import NO_TARGET, why_not
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.surgery.upcycle_options import UpcycleOptions


def dense_form(config: Mapping[str, Any]) -> Architecture:
    """The form of a dense checkpoint's family.

    Raises:
        CheckpointError: the config names no family.
        UnsupportedError: an MoE already, quantised, or a family without an exact target.
    """
    form = find(config)
    form = form.of(config) if form is not None else None
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json must name its family in model_type ({model_type!r})")
    if form is not None and form.is_moe:
        raise UnsupportedError(
            f"{model_type} is a mixture of experts already; upcycle starts from a dense model"
        )
    if form is None or not targets_of(form.model_type):
        reason = NO_TARGET.get(model_type, "no pair is known for it")
        known = sorted({t.dense for a in all_architectures().values() for t in a.twins})
        raise UnsupportedError(
            f"no MoE family computes what a dense {model_type!r} computes: {reason}",
            hint=f"Dense families with an exact target: {', '.join(known)}.",
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            "the source is quantised (quantization_config); experts are made from plain weights",
            hint="Upcycle the unquantised checkpoint, and quantise the result.",
        )
    return form


def stated_config(config: Mapping[str, Any], dense: Architecture) -> dict[str, Any]:
    """A dense config with everything written out that its class assumes, in both dialects."""
    stated = state_facts(config, dense)
    both_dialects(stated, dense)
    return stated


def choose_target(
    stated: Mapping[str, Any], dense: Architecture, options: UpcycleOptions
) -> tuple[Architecture, Twin]:
    """The target asked for, or the first that fits in the registry, whose order is by portability.

    Args:
        stated: the source's config, as `stated_config` gives it.
        dense: the source's form.
        options: of the upcycle.

    Raises:
        UnsupportedError: no pair, or facts of this checkpoint that the target has no home for.
    """
    targets = targets_of(dense.model_type)
    if options.target is not None:
        wanted = [a for a in targets if a.model_type == options.target]
    elif options.method == "shared":
        wanted = [a for a in targets if a.shared or a.parallel_mlp]
    else:
        wanted = list(targets)
    if not wanted:
        raise _no_pair(dense, options, targets)
    fitting = [a for a in wanted if not unmet(stated, dense, a)]
    form = fitting[0] if fitting else wanted[0]
    if not fitting:
        others = [a.model_type for a in targets if not unmet(stated, dense, a)]
        raise UnsupportedError(
            f"{dense.model_type} → {form.model_type} is not exact for this checkpoint",
            problems=unmet(stated, dense, form),
            hint=f"Exact for it: --target {' or '.join(others)}."
            if others
            else f"No target of {dense.model_type} has a home for all of this checkpoint.",
        )
    twin = form.twin_of(dense.model_type)
    assert twin is not None
    return form, twin


def _no_pair(
    dense: Architecture, options: UpcycleOptions, targets: tuple[Architecture, ...]
) -> UnsupportedError:
    names = ", ".join(a.model_type for a in targets)
    if options.target is None:
        return UnsupportedError(
            f"no target of {dense.model_type} has a shared expert, which --method shared needs",
            hint=f"Choose another method; exact targets: {names}.",
        )
    why = why_not(dense.model_type, options.target)
    return UnsupportedError(
        f"{dense.model_type} → {options.target} is not exact: {why}",
        hint=f"Exact targets of {dense.model_type}: {names}.",
    )


def unmet(stated: Mapping[str, Any], dense: Architecture, form: Architecture) -> list[str]:
    """Facts of a source that the target has no home for, in words; empty where the pair is exact.

    Args:
        stated: the source's config, its silent assumptions written out, in both dialects.
        dense: the source's form.
        form: the target's form.
    """
    twin = form.twin_of(dense.model_type)
    assert twin is not None
    problems = [why for r in twin.requires if (why := r.broken_by(stated))]
    if rope_per_layer_type(stated) and not (form.per_layer_rope and dense.per_layer_rope):
        problems.append("rope_parameters per layer type have no home: there is one set for all")
    return problems
