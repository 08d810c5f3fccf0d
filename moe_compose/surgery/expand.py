"""Expand: every expert several times, to be trained apart (expert upcycling, arXiv 2604.19835)."""

from __future__ import annotations

from dataclasses import asdict

from moe_compose.architectures import Architecture, MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.expert_options import ExpandOptions
from moe_compose.surgery.plan import UNTRAINED, Plan, Preservation
from moe_compose.surgery.prune import count_note
from moe_compose.surgery.selected_config import with_top_k
from moe_compose.surgery.selection import moe_form, select_experts
from moe_compose.surgery.upcycle_options import MOST_EXPERTS


def expand(source: TensorSource, options: ExpandOptions) -> Plan:
    """Plan an MoE with every expert several times, copies next to one another. Reads no weights.

    Args:
        source: an MoE.
        options: how often, and what becomes of top-k.

    Returns:
        A checked plan; `plan.preservation` says whether it is exact.

    Raises:
        OptionError: options that cannot be meant.
        UnsupportedError: a selection that the family cannot hold.
    """
    form, moe = moe_form(source)
    problems = []
    if options.factor < 2 or options.factor * moe.num_experts > MOST_EXPERTS:
        most = MOST_EXPERTS // moe.num_experts
        problems.append(f"factor ({options.factor}) must be between 2 and {most}")
    if options.top_k not in ("scale", "keep"):
        problems.append(f"top_k ({options.top_k}) must be scale or keep")
    if problems:
        raise OptionError(f"cannot expand {source.label} like this", problems=problems)
    if moe.routing.hashed_layers and options.top_k == "scale":
        raise UnsupportedError(
            f"{source.label} has layers that route by a table of token ids, which has {moe.top_k} "
            "entries for each: top-k cannot grow",
            hint="Use --top-k keep.",
        )
    ids = [e for e in range(moe.num_experts) for _ in range(options.factor)]
    selected = select_experts(source, dict.fromkeys(moe.sparse_layers, ids), mtp=options.mtp)
    top_k = moe.top_k * (options.factor if options.top_k == "scale" else 1)
    return Plan(
        operation="expand",
        options=asdict(options),
        config=with_top_k(selected.config, form, top_k),
        outputs=selected.outputs,
        sources={"source": source},
        preservation=_preservation(form, moe, options),
        files={n: p for n, p in source.files.items() if n != "README.md"},
        dropped=selected.dropped,
        notes=tuple(filter(None, [UNTRAINED, count_note(form, len(ids))])),
        card=source.files.get("README.md"),
    ).check()


def _preservation(form: Architecture, moe: MoE, options: ExpandOptions) -> Preservation:
    """Copies of an expert share its weight evenly, where weights are renormalised, or are a softmax
    over all experts; then k · factor of them give what k gave.
    """
    routing, times = moe.routing, options.factor
    if options.top_k == "keep":
        return Preservation(
            "none",
            f"every expert {times} times with top_k = {moe.top_k} as before: copies of the best "
            "take the place of the next best",
        )
    if routing.grouped and routing.group_score == "top2":
        why = "groups are chosen by the sum of their two best experts, now two copies of one"
    elif routing.selection_bias and routing.score == "softmax":
        why = "a correction bias is added to a softmax that is now shared by copies"
    elif moe.zero_experts:
        why = "rows of no expert share the softmax, and are not repeated"
    elif routing.sums_to is None and routing.score != "softmax":
        why = f"the routing of {form.model_type} ({routing.describe()}) does not renormalise"
    else:
        return Preservation("exact", f"every expert {times} times, and {times} times the top-k")
    return Preservation("none", why)
