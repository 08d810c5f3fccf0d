"""Remove experts of an MoE by name or number: opting out (FlexOlmo, arXiv 2507.07024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from moe_compose.architectures import MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.expert_names import index_of
from moe_compose.surgery.expert_options import RemoveOptions
from moe_compose.surgery.plan import UNTRAINED, Plan, Preservation
from moe_compose.surgery.prune import count_note
from moe_compose.surgery.selected_config import with_top_k
from moe_compose.surgery.selection import moe_form, select_experts


def remove_expert(source: TensorSource, options: RemoveOptions) -> Plan:
    """Plan an MoE without some experts. Reads no weights.

    The result is exactly the source with those experts masked out of its routers; the others keep
    their bytes.

    Args:
        source: an MoE.
        options: which experts go.

    Returns:
        A checked plan.

    Raises:
        OptionError: options that cannot be meant, all faults at once.
        UnsupportedError: a selection that the family cannot hold.
    """
    form, moe = moe_form(source)
    gone: set[int] = set()
    problems = []
    for wanted in options.expert:
        try:
            gone.add(index_of(source.config, moe.num_experts, wanted))
        except OptionError as error:
            problems.append(str(error))
    problems += list(_problems(options, moe, len(gone)))
    if problems:
        raise OptionError(f"cannot remove experts of {source.label} like this", problems=problems)
    kept = [e for e in range(moe.num_experts) if e not in gone]
    selected = select_experts(source, dict.fromkeys(moe.sparse_layers, kept), mtp=options.mtp)
    text = ", ".join(map(str, sorted(gone)))
    return Plan(
        operation="remove-expert",
        options=asdict(options),
        config=with_top_k(selected.config, form, options.top_k or moe.top_k),
        outputs=selected.outputs,
        sources={"source": source},
        preservation=Preservation(
            "none",
            f"expert {text} of {moe.num_experts} is removed from every layer; exactly the source "
            "with it masked out of its routers",
        ),
        files={n: p for n, p in source.files.items() if n != "README.md"},
        dropped=selected.dropped,
        notes=tuple(filter(None, [UNTRAINED, count_note(form, len(kept))])),
        card=source.files.get("README.md"),
        decided={"kept": {str(layer): kept for layer in moe.sparse_layers}},
    ).check()


def _problems(options: RemoveOptions, moe: MoE, gone: int) -> Iterator[str]:
    if not options.expert:
        yield "no expert is named (expert, at least once)"
    left, top_k = moe.num_experts - gone, options.top_k or moe.top_k
    if not 1 <= top_k <= left:
        yield (
            f"{left} experts would be left, and each token passes through {top_k}: remove fewer, "
            "or lower top_k as well"
        )
