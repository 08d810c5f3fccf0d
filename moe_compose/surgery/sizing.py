"""How many experts a size allows: from names and shapes alone, no weight is read.

A size is a share of the source's bytes (`0.7`) or bytes of weights on disk (`20GB`).
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_compose.architectures import MoE
from moe_compose.checkpoint.source import TensorSource
from moe_compose.checkpoint.write_checks import human, parse_bytes
from moe_compose.errors import OptionError
from moe_compose.surgery.expert_options import MtpPolicy
from moe_compose.surgery.selection import moe_form, select_experts


def size_problem(size: str) -> str | None:
    """What is the matter with a size, if anything."""
    try:
        share = _share(size)
        if share is None:
            parse_bytes(size)
        return None if share is None or share > 0 else f"size ({size}) must be above 0"
    except ValueError as error:
        return f"size ({size}) must be a share of the source, such as 0.7, or {error}"


def _share(size: str) -> float | None:
    """A number of at most 1 is a share; anything else is bytes."""
    try:
        value = float(size)
    except ValueError:
        return None
    return value if value <= 1 else None


def bytes_allowed(size: str, whole: int) -> int:
    """The largest number of bytes within a size.

    Args:
        size: without a `size_problem`.
        whole: bytes of the source.

    >>> bytes_allowed("0.7", 1000), bytes_allowed("2KB", 1000)
    (700, 2000)
    """
    share = _share(size)
    return parse_bytes(size) if share is None else int(whole * share + 1e-9)


def bytes_of(source: TensorSource) -> int:
    """Of all tensors."""
    return sum(t.nbytes for t in source.tensors.values())


def count_within(source: TensorSource, size: str, counts: Sequence[int], mtp: MtpPolicy) -> int:
    """The largest count of experts with which the result takes at most `size`.

    Args:
        source: an MoE.
        size: as `--size` takes it.
        counts: that the router can do with, ascending.
        mtp: what becomes of multi-token-prediction layers.

    Raises:
        OptionError: not even the smallest count is within it.
    """
    _, moe = moe_form(source)
    whole = bytes_of(source)
    limit = bytes_allowed(size, whole)
    low, high = 0, len(counts)
    while low < high:  # counts[:low] are within the limit
        middle = (low + high) // 2
        if _bytes_with(source, moe, counts[middle], mtp) <= limit:
            low = middle + 1
        else:
            high = middle
    if low:
        return counts[low - 1]
    least = f"there is no count that the router (top_k = {moe.top_k}) can do with"
    if counts:
        smallest = _bytes_with(source, moe, counts[0], mtp)
        least = (
            f"with {counts[0]} experts a layer, the fewest that the router (top_k = {moe.top_k}) "
            f"can do with, it takes {human(smallest)}, {smallest / whole:.2f} of the source"
        )
    raise OptionError(
        f"{source.label} ({human(whole)}) cannot be made as small as {size} by removing experts",
        problems=[least],
        hint="Quantise it as well, or start from a smaller model.",
    )


def _bytes_with(source: TensorSource, moe: MoE, count: int, mtp: MtpPolicy) -> int:
    """Bytes of the result with so many experts in every layer."""
    groups = moe.routing.groups if moe.routing.grouped else 1
    size = moe.num_experts // groups
    ids = [g * size + e for g in range(groups) for e in range(count // groups)]
    selected = select_experts(source, dict.fromkeys(moe.sparse_layers, ids), mtp=mtp)
    return sum(o.info.nbytes for o in selected.outputs)


def size_note(source: TensorSource, nbytes: int, count: int) -> str:
    """What came out, in words.

    Args:
        source: an MoE.
        nbytes: of the result.
        count: experts that every layer has left.
    """
    experts, whole = moe_form(source)[1].num_experts, bytes_of(source)
    return (
        f"{experts - count} of {experts} experts a layer are gone ({1 - count / experts:.1%}), and "
        f"{1 - nbytes / whole:.1%} of the size: {human(whole)} → {human(nbytes)}"
    )
