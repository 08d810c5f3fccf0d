"""A model as it is, as a plan: to be summed up, or where a dry run cannot know what changes."""

from __future__ import annotations

from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.plan import OutputTensor, Plan, Preservation
from moe_compose.surgery.transforms import Read

#: How far the function of a model that is only summed up is kept.
SAME = Preservation("exact", "nothing is done")

#: Of what is trained or fitted, before it is.
LATER = Preservation("none", "what it changes is known when it has run")


def unchanged(
    source: TensorSource, operation: str = "copy", preservation: Preservation = SAME
) -> Plan:
    """Plan the same model again. Reads no weights.

    Args:
        source: any model.
        operation: what it stands for.
        preservation: how far that keeps the function.
    """
    return Plan(
        operation=operation,
        options={},
        config=dict(source.config),
        outputs=tuple(OutputTensor(n, Read("source", t)) for n, t in source.tensors.items()),
        sources={"source": source},
        preservation=preservation,
    )
