"""From statistics to what `merge` averages.

Surgery takes a grouping and knows of no statistics (`surgery.merge`); here groupings are made
(`grouping.py`) and their neurons aligned (`alignment.py`).

All layers are grouped by what the *original* model does. REAM (2604.04356) goes through the layers
in sequence, so that each is measured behind the merged ones before it: that is `sequence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.surgery.groups import Grouping
from moe_compose.surgery.merge import check_merge_options, merge_grouped
from moe_compose.surgery.merge_options import MergeOptions
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.selection import moe_form

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats


def merge(
    source: TensorSource,
    stats: ExpertStats | Grouping,
    options: MergeOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Plan an MoE whose experts are weighted means of those of `source`.

    With statistics, the weights of experts that are merged are read, two at a time, to align their
    neurons (not with align = none); with a grouping, none are read.

    Args:
        source: an MoE: a checkpoint, or a plan.
        stats: what calibration measured on it, with similarities; or what `group_and_align` made
            of that.
        options: how many experts are left, and how they are grouped.
        progress: told how many layers of how many are aligned.

    Returns:
        A checked plan, of the class "none".

    Raises:
        OptionError: options that cannot be meant, all faults at once; or no similarities.
        CheckpointError: the statistics are of another checkpoint.
        UnsupportedError: experts of this family, or these tensors, cannot be merged; or scipy is
            not installed.

    Example:
        >>> small = merge(moe, stats, MergeOptions(keep=4, method="ream"))   # doctest: +SKIP
        >>> small.decided["groups"]["0"]                                     # doctest: +SKIP
        [[0, 5], [2], [3, 1, 4, 6], [7]]
    """
    options = check_merge_options(source, options)
    if not isinstance(stats, Grouping):
        return merge_grouped(source, group_and_align(source, stats, options, progress), options)
    if problems := list(_mismatch(stats, options)):
        raise OptionError(f"cannot merge experts of {source.label} like this", problems=problems)
    return merge_grouped(source, stats, options)


def group_and_align(
    source: TensorSource,
    stats: ExpertStats,
    options: MergeOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Grouping:
    """Which experts become one, and how their neurons correspond.

    Args:
        source: an MoE.
        stats: what calibration measured on it, with similarities.
        options: of the merging.
        progress: told how many layers of how many are aligned.

    Raises:
        OptionError, CheckpointError, UnsupportedError: as `merge`.
    """
    from moe_compose.calibration.alignment import align
    from moe_compose.calibration.grouping import group_experts

    options = check_merge_options(source, options)
    _, moe = moe_form(source)
    grouping = group_experts(stats.check(source), options, moe)
    if options.aligned_by == "none":
        return grouping
    return align(source, grouping, options.aligned_by, stats, progress)


def _mismatch(grouping: Grouping, options: MergeOptions) -> Iterator[str]:
    if grouping.method != options.method:
        yield f"the grouping is by {grouping.method}, not by {options.method}"
    if (grouping.aligned or "none") != options.aligned_by:
        by = grouping.aligned or "none"
        yield f"its neurons are aligned by {by}, the options say {options.aligned_by}"
