"""Packing an expert for somebody else: what it is made for, and what is known of its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import TensorSource
from moe_compose.composition.kept import stats_of, with_stats, work_folder
from moe_compose.composition.options import RoutingOptions
from moe_compose.errors import OptionError
from moe_compose.surgery.compose import plan_composition
from moe_compose.surgery.compose_options import ComposeOptions
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.expert_names import index_of, names_of
from moe_compose.surgery.pack_expert import pack_expert as plan_pack
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.selection import moe_form

if TYPE_CHECKING:
    from moe_compose.calibration.texts import Texts

#: Tells how far a measurement is: layers done, layers in all.
Progress = Callable[[int, int], None]


def pack_expert(
    source: TensorSource,
    expert: str | int | None = None,
    *,
    base: TensorSource | None = None,
    name: str | None = None,
    target: str | None = None,
    texts: Texts | None = None,
    routing: RoutingOptions | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a small checkpoint of one expert, to be sent to whoever has the base.

    It holds the expert's tensors, its router rows, a digest of the shared tensors beside which it
    works, and, where there are any, second moments of router inputs on its text. No text, and
    nothing of other experts.

    Args:
        source: an MoE; or a dense model that was trained from `base`.
        expert: of an MoE, which, by name or number.
        base: of a dense model.
        name: what the expert is called; required for a dense model.
        target: for a dense model: the MoE family that it is for.
        texts: of the expert, for statistics; without, those that came with an MoE go along.
        routing: how text is run.
        progress: told after every layer that is measured.

    Returns:
        A plan of an artifact that `add_expert` and `swap_expert` take.

    Raises:
        OptionError: arguments that cannot be meant.
        UnsupportedError: models that do not fit, every difference named.

    Example:
        >>> law = mc.pack_expert(tuned, base=seed, name="law", texts=statutes)  # doctest: +SKIP
        >>> mc.write(law, "law/")                                               # doctest: +SKIP
    """
    from moe_compose.composition.forcing import Routers
    from moe_compose.composition.measure import measure, shared_digest

    model, index, called = _model(source, expert, base, name, target)
    digest = shared_digest(model, Routers.of(model))
    plan = plan_pack(model, index, {"base": digest, "name": called, "of": source.label})
    if texts is not None:
        stats = measure(model, {index: texts}, routing, folder=work_folder(), progress=progress)
    else:
        kept = stats_of(source)
        known = kept is not None and called in kept.names
        if kept is None or not known:
            return plan
        stats = kept
    before = stats.names[index]
    return with_stats(plan, stats.select([before]).renamed(before, called or before))


def pack_unmeasured(
    source: TensorSource,
    expert: str | int | None = None,
    *,
    base: TensorSource | None = None,
    name: str | None = None,
    target: str | None = None,
) -> Plan:
    """`pack_expert` without the digest of the shared tensors and without statistics: reads no
    weights.
    """
    model, index, called = _model(source, expert, base, name, target)
    return plan_pack(model, index, {"name": called, "of": source.label})


def _model(
    source: TensorSource,
    expert: str | int | None,
    base: TensorSource | None,
    name: str | None,
    target: str | None,
) -> tuple[TensorSource, int, str]:
    """An MoE that has the expert, which one it is, and what it is called."""
    from moe_compose.architectures import find

    form = find(source.config)
    if form is None or (form.is_moe and form.moe(source.config).sparse_layers):
        _, moe = moe_form(source)
        if expert is None or base is not None:
            raise OptionError(
                f"{source.label} is a mixture: say which of its {moe.num_experts} experts is "
                "packed (--expert), without a base"
            )
        index = index_of(source.config, moe.num_experts, expert)
        return source, index, name or names_of(source.config, moe.num_experts)[index] or str(index)
    if base is None or name is None or expert is not None:
        raise OptionError(
            f"{source.label} is dense: its expert needs the base that it was trained from (--base) "
            "and a name (--name), and no number"
        )
    options = ComposeOptions(
        top_k=1, base_expert=False, shared="base", router="zeros", target=target
    )
    return plan_composition(base, {name: Donor(source.label, source)}, options), 0, name
