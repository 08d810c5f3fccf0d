"""Second moments → router rows → a plan that has them.

Per layer, with X all experts' text, and x the router's inputs on the text of expert e (DUME,
2603.29765):

    A = Σ_e Σ x xᵀ,  b_e = Σ x
    W = (A + λI)⁻¹ (b_e − mean_e b),     λ = ridge · mean(diag A)
    row e = scale_e · W_e / ‖W_e‖

which is ridge least squares to 1 for the expert's own text and 0 for that of the others, targets
centred, since routers have no bias. `hidden` takes the mean of x in place of W_e.

An expert without text has a row of zeros, and is left out of the mean: it is as likely as an expert
that knows nothing of the token. Text that belongs to nobody then goes to experts that do not know
it as well (0.3 nats on small real models), so give the base some general text where there is any.

Shape suffixes: E experts, D what the router is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorInfo, TensorSource, torch_dtype
from moe_compose.composition.forcing import Routers
from moe_compose.composition.statistics import RouterStats
from moe_compose.errors import CheckpointError, OptionError, UnsupportedError
from moe_compose.recovery.ridge import solve as ridge_solve
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.surgery.replace import ChangedWriter, replace_tensors

#: Layer → router rows, fp64 `[E, D]`.
Rows = Mapping[int, Tensor]


def solve(stats: RouterStats) -> dict[int, Tensor]:
    """Router rows, `[E, D]` fp64 by layer: a function of the statistics alone.

    Sums are added up in the order of the experts, so that statistics that were joined one after
    another give the same bits as those of one measurement. Takes 3 · D² · 8 bytes.

    Raises:
        OptionError: no expert has text.
        CheckpointError: the statistics cannot be read.
    """
    with_text = [i for i, e in enumerate(stats.experts) if e.tokens]
    if not with_text:
        raise OptionError("no expert has text: there is nothing that rows could follow from")
    rows = {}
    for layer, width in stats.widths.items():
        found_ED = torch.zeros(len(stats.experts), width, dtype=torch.float64)
        found_ED[with_text] = _directions(stats, layer, with_text)
        scale_E = torch.tensor([e.scale for e in stats.experts], dtype=torch.float64)
        rows[layer] = scale_E[:, None] * torch.nn.functional.normalize(found_ED, eps=1e-300)
    return rows


def _directions(stats: RouterStats, layer: int, experts: Sequence[int]) -> Tensor:
    """Rows of the experts that have text, of any length."""
    names = [stats.experts[i].name for i in experts]
    b_ED = torch.stack([stats.sum(layer, name) for name in names])
    if stats.method == "hidden":
        return b_ED
    width = stats.widths[layer]
    gram_DD = torch.zeros(width, width, dtype=torch.float64)
    for name in names:
        gram_DD += stats.second(layer, name)
    return ridge_solve(gram_DD, (b_ED - b_ED.mean(0)).T, stats.ridge).T


def with_rows(
    source: TensorSource,
    rows: Rows,
    *,
    only: Sequence[int] | None = None,
    folder: Path | None = None,
    options: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    reports: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a model with these router rows, in the dtype of its own; biases stay as they are.

    Args:
        source: an MoE.
        rows: `[E, D]` for every sparse layer.
        only: experts whose rows are taken; None: all.
        folder: a new one for the changed tensors, to be kept as long as the result is used; None: a
            temporary one, gone with the result.
        options: of what made the rows, for the record.
        notes: what a user should know.
        reports: documents beside the result.

    Raises:
        OptionError: rows of other layers or shapes; all faults at once.
        UnsupportedError: quantised routers.
    """
    routers = Routers.of(source)
    check_rows(source, routers, rows, only)
    writer = ChangedWriter(source.config, folder)
    try:
        for layer, name in routers.names.items():
            info = source.tensors[name]
            value_ED = stored(rows[layer], info)
            if only is None:
                writer.add({name: value_ED}, {})
            else:
                chosen = sorted({*only})
                writer.add({name: value_ED[chosen]}, {name: chosen})
        changed = writer.finish()
    except BaseException:
        writer.discard()
        raise
    assert changed is not None
    which = "new router rows"
    if only is not None:
        which += (
            f" for expert{'s' if len({*only}) > 1 else ''} {', '.join(map(str, sorted({*only})))}"
        )
    return replace_tensors(
        source,
        changed,
        operation="route",
        preservation=Preservation("none", which),
        options=options,
        notes=notes,
        reports=reports,
    )


def stored(rows_ED: Tensor, info: TensorInfo) -> Tensor:
    """Rows as the checkpoint holds them."""
    return rows_ED.to(torch_dtype(info.dtype))


def check_rows(
    source: TensorSource, routers: Routers, rows: Rows, only: Sequence[int] | None
) -> None:
    """Hold rows to a model.

    Raises:
        OptionError: rows of other layers or shapes; all faults at once.
        UnsupportedError: quantised routers.
        CheckpointError: rows that are no numbers.
    """
    experts = routers.moe.num_experts
    problems = []
    if rows.keys() != routers.names.keys():
        problems.append(f"rows of layers {sorted(rows)}, routers in {sorted(routers.names)}")
    for layer, rows_ED in rows.items():
        wanted = (experts, routers.widths.get(layer))
        if layer in routers.names and rows_ED.shape != wanted:
            problems.append(f"layer {layer}: rows {list(rows_ED.shape)}, not {list(wanted)}")
    if only is not None and not all(0 <= e < experts for e in only):
        problems.append(f"experts must be 0 to {experts - 1} ({list(only)})")
    if only is not None and not only:
        problems.append("no expert is named")
    if problems:
        raise OptionError(f"these rows are not for {source.label}", problems=problems)
    narrow = [n for n in routers.names.values() if source.tensors[n].dtype not in FLOAT_DTYPES]
    if narrow:
        raise UnsupportedError(
            f"{narrow[0]} is quantised ({source.tensors[narrow[0]].dtype}): rows would be rounded "
            "away"
        )
    if not all(bool(r.isfinite().all()) for r in rows.values()):
        raise CheckpointError("router rows are NaN or infinite")
