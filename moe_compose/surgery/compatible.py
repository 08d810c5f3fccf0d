"""Whether models can become parts of one: the same family, shapes, facts and tokenizer.

All that differs is named at once, before anything is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_compose.architectures import Architecture
from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.expert_names import ENTRY
from moe_compose.surgery.pairing import stated_config

#: Entries that say nothing about what a model computes.
_DESCRIPTIVE = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp", "id2label"),
    *("label2id", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("output_attentions", "output_hidden_states", "return_dict", "problem_type", ENTRY),
}

#: Tokenizer files larger than this are no tokenizers.
_MOST_BYTES = 256 << 20


def config_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, besides: set[str] | None = None
) -> Iterator[str]:
    """Entries under which two configs compute differently, in words.

    Args:
        ours: a config with everything written out.
        theirs: another.
        besides: entries that may differ.
    """
    ignored = _DESCRIPTIVE | (besides or set())
    for name in sorted({*ours, *theirs} - ignored):
        mine, other = ours.get(name), theirs.get(name)
        if mine != other:
            yield f"{name} is {_short(other)}, not {_short(mine)}"


def dense_differences(
    base: TensorSource, other: TensorSource, dense: Architecture
) -> Iterator[str]:
    """What keeps a dense model from being composed with a base of its family.

    Args:
        base: the base.
        other: the model.
        dense: the form of both.
    """
    yield from config_differences(
        stated_config(base.config, dense), stated_config(other.config, dense)
    )
    yield from shape_differences(base, other)
    yield from tokenizer_differences(base, other)


def shape_differences(base: TensorSource, other: TensorSource) -> Iterator[str]:
    """Tensors that one of two models has and the other has not, or not of that shape."""
    missing = sorted(set(base.tensors) - set(other.tensors))
    surplus = sorted(set(other.tensors) - set(base.tensors))
    if missing:
        yield f"it lacks {_listed(missing)}"
    if surplus:
        yield f"it has {_listed(surplus)}, which the base has not"
    misfits = [
        n
        for n, t in base.tensors.items()
        if n in other.tensors and other.tensors[n].shape != t.shape
    ]
    if misfits:
        first = misfits[0]
        shapes = f"{list(other.tensors[first].shape)}, not {list(base.tensors[first].shape)}"
        more = f"; {len(misfits) - 1} more differ" if len(misfits) > 1 else ""
        yield f"{first} has shape {shapes}{more}"


def tokenizer_differences(base: TensorSource, other: TensorSource) -> Iterator[str]:
    """Whether two models read text differently, where both have a tokenizer.json."""
    ours, theirs = _tokenizer(base), _tokenizer(other)
    if ours is not None and theirs is not None and ours != theirs:
        yield "its tokenizer.json cuts text differently (vocabulary, merges or normalisation)"


def _tokenizer(source: TensorSource) -> str | None:
    """A fingerprint of what cuts text; templates, which fine-tuning changes, are no part of it."""
    path = source.files.get("tokenizer.json")
    if path is None or path.stat().st_size > _MOST_BYTES:
        return None
    try:
        found = json.loads(path.read_bytes())
        parts = [found.get(n) for n in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    except (ValueError, AttributeError):
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
