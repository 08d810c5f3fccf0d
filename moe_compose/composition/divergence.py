"""How far the shared parameters of models have drifted from their base's.

Anchored experts were trained beside frozen shared parameters: FlexOlmo takes for granted that they
are still equal, bit for bit; BAR averages what its later stages have moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.evaluate import stream, value
from moe_compose.surgery.members import BASE, Members
from moe_compose.surgery.transforms import Transform

#: What was found, beside the result.
REPORT_NAME = "shared_parameters.json"

#: Tensors that are named, the farthest first.
_NAMED = 20


def divergence(members: Members) -> dict[str, Any]:
    """Compare every shared tensor of every donor with the base's. Reads all of them.

    Args:
        members: of a composition.

    Returns:
        Donor → `tensors` compared, how many are bit-`equal`, and the `farthest`: name and relative
        distance `‖W − W_base‖ / ‖W_base‖`.
    """
    base = members.carried(BASE)
    found: dict[str, Any] = {}
    for name, giver in members.givers.items():
        if giver.source is members.base and giver.adapter is None:
            continue
        theirs = members.carried(name)
        both = [n for n in base if n in theirs]
        apart = [n for n in both if not _equal(base[n], theirs[n], members.sources)]
        far = sorted(
            ((_distance(base[n], theirs[n], members.sources), n) for n in apart), reverse=True
        )
        found[name] = {
            "model": giver.source.label,
            "tensors": len(both),
            "equal": len(both) - len(apart),
            "farthest": [{"name": n, "distance": d} for d, n in far[:_NAMED]],
        }
    return found


def require_equal(found: dict[str, Any]) -> None:
    """Refuse donors whose shared parameters are not the base's.

    Raises:
        UnsupportedError: the first tensors that differ, by donor.
    """
    problems = list(_unequal(found))
    if problems:
        raise UnsupportedError(
            "FlexOlmo's experts share everything but their FFNs, bit for bit; these do not",
            problems=problems,
            hint="Average what has moved with --preset bar, or take the base's with --shared base "
            "under --preset btx.",
        )


def _unequal(found: dict[str, Any]) -> Iterator[str]:
    for name, said in found.items():
        if said["farthest"]:
            apart, first = said["tensors"] - said["equal"], said["farthest"][0]
            yield (
                f"{name}: {apart} of {said['tensors']} shared tensors differ, the farthest "
                f"{first['name']} by {first['distance']:.2g} of its norm"
            )


def _equal(a: Transform, b: Transform, sources: dict[str, TensorSource]) -> bool:
    """The same dtype, shape and bytes."""
    if (a.spec.dtype, a.spec.shape) != (b.spec.dtype, b.spec.shape):
        return False
    return _hash(a, sources) == _hash(b, sources)


def _hash(x: Transform, sources: dict[str, TensorSource]) -> bytes:
    import torch

    h = hashlib.sha256()
    for piece in stream(x, sources):
        h.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.digest()


def _distance(a: Transform, b: Transform, sources: dict[str, TensorSource]) -> float:
    if a.spec.dtype not in FLOAT_DTYPES or a.spec.shape != b.spec.shape:
        return float("inf")
    x, y = value(a, sources).double(), value(b, sources).double()
    return float((y - x).norm() / x.norm().clamp_min(1e-300))
