"""The folder of a LoRA adapter, as PEFT writes it: `adapter_config.json` beside
`adapter_model.safetensors`, whose tensors are called `base_model.model.MODULE.lora_A.weight`.

PEFT has many relatives of LoRA under the same `peft_type`. A config is taken for a plain LoRA when
nothing is set in it that a plain one has not, so that what is not known here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.folder import LocalFiles, read_headers
from moe_compose.checkpoint.header import load_object
from moe_compose.checkpoint.reader import Checkpoint, files_of
from moe_compose.checkpoint.source import Extent, TensorInfo
from moe_compose.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 16 << 20
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

#: Entries of a plain LoRA's config. Any other that is set makes it something else.
_PLAIN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
    *("task_type", "use_rslora"),
}

#: Entries that others set → what they do.
_MORE: Mapping[str, str] = {
    "alora_invocation_tokens": "the adapter acts only behind certain tokens",
    "layer_replication": "layers are repeated",
    "lora_bias": "the adapter adds biases",
    "modules_to_save": "whole modules were trained and saved beside the adapter",
    "target_parameters": "it changes parameters that are no linear layer's weight",
    "trainable_token_indices": "it changes rows of the embedding",
    "use_dora": "DoRA also scales the columns of the changed weight",
}

#: Ways to start A and B that leave W itself as it is; others take their product out of it first.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_adapter(path_or_id: str | Path) -> Checkpoint:
    """Config and weights of an adapter: of a folder, or downloaded from the Hub."""
    files, remote = files_of(path_or_id)
    folder, label = files.path, files.label
    assert folder is not None
    if missing := [n for n in (CONFIG_NAME, WEIGHTS_NAME) if n not in files.sizes]:
        raise CheckpointError(
            f"{label} holds no {' and no '.join(missing)}",
            hint="An adapter is a folder that PEFT wrote, with its weights as safetensors.",
        )
    size = files.sizes[CONFIG_NAME]
    if size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{label}/{CONFIG_NAME} is too large ({size} bytes)")
    config = load_object(files.read(CONFIG_NAME, 0, size), f"{label}/{CONFIG_NAME}")
    weights = LocalFiles(folder, label, {WEIGHTS_NAME: files.sizes[WEIGHTS_NAME]})
    (header,) = read_headers(weights).values()
    file = folder / WEIGHTS_NAME
    return Checkpoint(
        label=label,
        config=config,
        tensors={t.name: t for t in header.tensors},
        files={},
        path=folder,
        revision=remote.commit if remote is not None else None,
        weight_files=(file,),
        _extents={
            t.name: Extent(file, at, t.nbytes)
            for t, at in zip(header.tensors, header.offsets, strict=True)
        },
    )


def beyond_lora(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config asks for beside A and B on linear layers."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type ({config.get('peft_type')}) must be LORA"
    if config.get("bias", "none") != "none":
        yield f"bias ({config['bias']}) must be none: biases were trained too"
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        yield f"init_lora_weights ({start}): the model's own weights were changed before training"
    for name in sorted(config.keys() - _PLAIN):
        if config[name]:
            yield f"{name} ({config[name]}): {_MORE.get(name, 'no part of a plain LoRA')}"


def pairs(stored: Checkpoint) -> tuple[dict[str, tuple[TensorInfo, TensorInfo]], list[str]]:
    """Module → A and B; and what is wrong, or what else is there."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    problems = []
    for name, info in stored.tensors.items():
        part = _PART.fullmatch(name.removeprefix(_PREFIX))
        if ".base_layer." in name:
            problems.append(f"{name} is the model's own (PEFT's save_embedding_layers=False)")
        elif part is None:
            problems.append(f"tensor {name} is neither A nor B of a linear layer")
        else:
            sides.setdefault(part["module"], {})[part["side"]] = info
    for module, found in sides.items():
        problems += [f"{module} has no lora_{s}" for s in "AB" if s not in found]
    pairs = {m: (f["A"], f["B"]) for m, f in sides.items() if len(f) == 2}
    return pairs, problems if sides else [*problems, "it changes no linear layer"]
