"""Upcycle: a dense checkpoint becomes a mixture of experts.

Everything outside the FFN is copied as bytes; each FFN becomes E experts and a router. The methods
differ in what the experts start as (`METHODS`), and in whether the result computes what the dense
model did; that is stated in the plan before anything is written, and measured afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from moe_compose.architectures import Architecture
from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.experts import sparse_layer
from moe_compose.surgery.ffn import ffn_dtype
from moe_compose.surgery.pairing import choose_target, dense_form, stated_config
from moe_compose.surgery.plan import UNTRAINED, Plan
from moe_compose.surgery.preservation import classify
from moe_compose.surgery.shared_tensors import carried, natural
from moe_compose.surgery.target import target_config
from moe_compose.surgery.upcycle_options import UpcycleOptions, check_options, output_dtype


def upcycle(source: TensorSource, options: UpcycleOptions) -> Plan:
    """Plan an MoE whose experts start from a dense model's FFNs. Reads no weights.

    Args:
        source: a dense checkpoint (or a plan of one).
        options: what is wanted.

    Returns:
        A checked plan; `plan.preservation` says how exact it is.

    Raises:
        OptionError: options that cannot be meant, all of them at once.
        UnsupportedError: no exact target, or a fact of the source (rope, window, bias, norm) that
            has no home in it.

    Example:
        >>> plan = upcycle(Checkpoint.open("dense"), UpcycleOptions(num_experts=8, top_k=2))
        >>> plan.preservation.kind
        'exact'
    """
    dense = dense_form(source.config)
    stated = stated_config(source.config, dense)
    form, twin = choose_target(stated, dense, options)
    check_options(options, form, twin, dense, source.config)
    config = target_config(stated, dense, form, twin, options)
    preservation = classify(form, config, twin, options, ffn_dtype(source, dense))
    dtype = output_dtype(options)
    files = {n: p for n, p in source.files.items() if n != "README.md" and not n.endswith(".py")}
    dropped: dict[str, str] = {}
    outputs = carried(source, dense, form, twin, config, dtype, dropped)
    for layer in form.moe(config).sparse_layers:
        outputs += sparse_layer(source, dense, form, config, layer, options, dtype)
    plan = Plan(
        operation="upcycle",
        options={**asdict(options), "target": form.model_type},
        config=config,
        outputs=tuple(sorted(outputs, key=lambda o: natural(o.name))),
        sources={"dense": source},
        preservation=preservation,
        files=files,
        dropped=dropped,
        notes=tuple(_notes(form, config, options)),
        card=source.files.get("README.md"),
    )
    return plan.check()


def _notes(form: Architecture, config: Mapping[str, Any], options: UpcycleOptions) -> Iterator[str]:
    moe = form.moe(config)
    yield UNTRAINED
    if options.method == "drop":
        yield "Drop-Upcycling overtakes copies only after long training (arXiv 2502.19261)"
    if options.top_k == 1 and moe.routing.sums_to is not None:
        yield (
            "with top_k = 1 and renormalised weights the router receives no gradient: "
            "train with top_k ≥ 2"
        )
    if moe.expert_width % 8:
        yield (
            f"expert width {moe.expert_width} is no multiple of 8: transformers' grouped_mm and "
            "most engines refuse it in bf16"
        )
