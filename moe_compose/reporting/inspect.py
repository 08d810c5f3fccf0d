"""Looking at a checkpoint, or at a plan of one, through its config and headers: no weights are
read and torch is not imported.

A family without a form is shown as far as names, shapes and the usual config keys go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from moe_compose.architectures import Architecture, find
from moe_compose.architectures.estimates import serving_memory
from moe_compose.architectures.parts import Parameters, count_parameters
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.reporting.documents import history_of, read_validation
from moe_compose.reporting.inspection import Experts, Inspection, Stored
from moe_compose.surgery.expert_names import names_of
from moe_compose.surgery.history import HISTORY_NAME

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "d_model", "n_embd")


def inspect(source: TensorSource) -> Inspection:
    """What a checkpoint is, from its config and headers; reads no weights.

    Args:
        source: a checkpoint, opened with or without its weights, or a plan.

    Returns:
        The inspection. Of a family that is not known, as much as can be told.

    Example:
        >>> inspect(Checkpoint.open("mixtral")).experts.top_k  # doctest: +SKIP
        2
    """
    notes: list[str] = []
    config, form = source.config, find(source.config)
    parameters, experts, sparse = _known(source, form, notes)
    elements = sum(info.numel for info in source.tensors.values())
    text = config.get("text_config")
    basics = {**config, **text} if form is None and isinstance(text, Mapping) else config
    checkpoint = source if isinstance(source, Checkpoint) else None
    return Inspection(
        checkpoint=source.label,
        revision=checkpoint.revision if checkpoint else None,
        model_type=_text(config.get("model_type")),
        hf_class=_class_name(config) or (form.hf_class if form else None),
        kind="unknown" if form is None else "moe" if experts else "dense",
        digest=source.digest(),
        layers=_number(basics, _LAYERS if form is None else (form.layers.name, *_LAYERS)),
        sparse_layers=sparse,
        hidden=_number(basics, _HIDDEN if form is None else (form.hidden.name, *_HIDDEN)),
        vocabulary=_number(basics, ("vocab_size",)),
        experts=experts,
        parameters=parameters,
        elements=elements,
        dtypes=_dtypes(source, notes),
        memory=serving_memory(basics, parameters.total if parameters else elements),
        weight_files={p.name: p.stat().st_size for p in checkpoint.weight_files}
        if checkpoint
        else {},
        files={name: path.stat().st_size for name, path in source.files.items()},
        history=_history(source, notes),
        validation=_validation(checkpoint, notes),
        notes=tuple(notes),
    )


def _known(
    source: TensorSource, form: Architecture | None, notes: list[str]
) -> tuple[Parameters | None, Experts | None, tuple[int, ...]]:
    """What the family's form tells: parameters, experts, and the layers that hold them."""
    if form is None:
        notes.append(
            f"no form for the family {source.config.get('model_type')!r}: experts, routing and "
            "active parameters are not told"
        )
        return None, None, ()
    if form.note:
        notes.append(form.note)
    try:
        parameters = count_parameters(form, source.config, source.tensors)
        if not form.is_moe:
            return parameters, None, ()
        moe = form.moe(source.config)
        if not moe.num_experts or not moe.sparse_layers:
            return parameters, None, ()
    except CheckpointError as error:
        notes.append(str(error))
        return None, None, ()
    names = names_of(source.config, moe.num_experts)
    experts = Experts(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        width=moe.expert_width,
        shared_width=moe.shared_width,
        zero_experts=moe.zero_experts,
        routing=moe.routing.describe(),
        names=names if any(names) else (),
    )
    return parameters, experts, moe.sparse_layers


def _dtypes(source: TensorSource, notes: list[str]) -> dict[str, Stored]:
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for info in source.tensors.values():
        row = found[info.dtype]
        row[0], row[1], row[2] = row[0] + 1, row[1] + info.numel, row[2] + info.nbytes
    if source.config.get("quantization_config") or not found.keys() <= FLOAT_DTYPES.keys():
        notes.append("parameters are stored elements: packed or scaled values count as stored")
    largest = sorted(found.items(), key=lambda item: -item[1][2])
    return {dtype: Stored(*row) for dtype, row in largest}


def _history(source: TensorSource, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    try:
        return tuple(history_of(source))
    except CheckpointError as error:
        notes.append(f"{HISTORY_NAME} is left out: {error.message}")
        return ()


def _validation(checkpoint: Checkpoint | None, notes: list[str]) -> Mapping[str, Any] | None:
    try:
        return read_validation(checkpoint) if checkpoint else None
    except CheckpointError as error:
        notes.append(f"validation is left out: {error.message}")
        return None


def _class_name(config: Mapping[str, Any]) -> str | None:
    found = config.get("architectures")
    return _text(found[0]) if isinstance(found, list) and found else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
