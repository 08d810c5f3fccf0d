"""How a checkpoint says that it is quantised: in its config, or in a file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_compose.checkpoint.source import TensorSource

#: Entries of a config that say it.
ENTRIES = ("quantization_config", "compression_config")

#: NVIDIA ModelOpt's own file, which older checkpoints have in place of an entry.
SIDE_FILE = "hf_quant_config.json"


def stated_quantisation(source: TensorSource) -> Mapping[str, Any] | None:
    """How a checkpoint, or a plan, is quantised, as its config says, or ModelOpt's file beside it;
    None where nothing says that it is.
    """
    stated = next((source.config[e] for e in ENTRIES if source.config.get(e)), None)
    if stated is not None:
        return stated if isinstance(stated, Mapping) else {"quant_method": stated}
    found = side_document(source, SIDE_FILE)
    stated = found.get("quantization") if isinstance(found, Mapping) else None
    return {"quant_method": "modelopt", **stated} if isinstance(stated, Mapping) else None


def side_document(source: TensorSource, name: str) -> Any:
    """What a JSON file beside the weights holds, or will hold; None where there is none, or none
    that can be read.
    """
    reports = getattr(source, "reports", {})  # a plan writes them
    if name in reports:
        return reports[name]
    path = source.files.get(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
